"""One rank of a tensor-parallel model: loads FOLDER over two processes and saves what rank 0 generates.

torchrun --nproc-per-node 2 tests/tensor_parallel_run.py FOLDER INPUTS.pt OUTPUTS.pt
"""

import sys

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from modeling_emu import EmuForMultimodalGeneration


def main(folder: str, inputs_file: str, outputs_file: str) -> None:
    dist.init_process_group("gloo")
    model = EmuForMultimodalGeneration.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    inputs = torch.load(inputs_file, weights_only=True)
    sharded = [name for name, parameter in model.named_parameters() if type(parameter).__name__ == "DTensor"]
    image = model.generate(**inputs, generation_mode="image").image_embeds
    ids = model.generate(**inputs, max_new_tokens=6)
    if dist.get_rank() == 0:
        torch.save({"image_embeds": image, "ids": ids, "sharded": sharded}, outputs_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
