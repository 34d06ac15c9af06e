"""Instruction tuning of two processes that shard the model; started by torchrun with ACCELERATE_USE_CPU=true.

torchrun --nproc-per-node 2 tests/training_instruct_run.py SETTINGS.json...
"""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from modeling_emu.training import run
from modeling_emu.training.recipes import InstructArguments, parse_recipe


class CheckedTrainer(run.EmuTrainer):
    """Says whether the model that it has trained is sharded."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        return output


def main(*settings_files: str) -> None:
    run.EmuTrainer = CheckedTrainer
    for file in settings_files:
        arguments = parse_recipe("instruct-cpu", json.loads(Path(file).read_text()), InstructArguments)
        assert (arguments[1].device.type, arguments[1].world_size) == ("cpu", 2)
        # accelerate shards on GPUs alone; PyTorch can on CPUs, too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        run.instruct(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
