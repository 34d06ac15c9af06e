"""Write a random checkpoint in the layout and at the size of the published Emu-pretrain.pt: 14.18 B numbers, 28.4 GB.

    python tests/benchmarks/make_full_size_checkpoint.py /big/Emu-pretrain.pt

The numbers are normal, standard deviation 0.02, in bfloat16. Every tensor is a window into one pool of them, so that the
memory is that of the pool; on disk each has its own bytes, as `torch.save` writes them.
"""

import argparse
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from published import PUBLISHED, get_shapes


POOL_NUMBERS = 1 << 28
BFLOAT16_BYTES = 2


def make_pool(seed: int = 0) -> torch.Tensor:
    """Random numbers, drawn in pieces so that no float32 copy of all of them exists."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(POOL_NUMBERS, dtype=torch.bfloat16)
    for piece in pool.split(1 << 24):
        piece.copy_(torch.randn(len(piece), generator=generator) * 0.02)
    return pool


def make_windows(pool: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state dict whose tensors have storages of their own over the pool's memory."""
    memory = memoryview(pool.view(torch.uint8).numpy())
    state_dict = {}
    position = 0
    for name, shape in get_shapes(PUBLISHED).items():
        count = torch.Size(shape).numel()
        position = (position + 4093) % (POOL_NUMBERS - count)
        window = torch.frombuffer(memory, dtype=torch.bfloat16, count=count, offset=position * BFLOAT16_BYTES)
        state_dict[name] = window.view(shape)
    return state_dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    started = time.perf_counter()
    state_dict = make_windows(make_pool())
    torch.save(state_dict, output)
    numbers = sum(tensor.numel() for tensor in state_dict.values())
    print(f"{output}: {len(state_dict)} tensors, {numbers / 1e9:.3f} B numbers, {output.stat().st_size / 1e9:.2f} GB")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
