# Copyright 2026 The Emu Hub-native developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Reading checkpoints without loading them, and writing safetensors without holding them.

Tensors of a source are views of mapped files: they take page cache, which the system reclaims, and no memory of the
process. Pickles are read with torch's own restricted reader, which runs no code.
"""

import hashlib
import json
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
ZIP_MAGIC = b"PK\x03\x04"
READ_BYTES = 1 << 20
NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a source, by key in the order of the file, and the files that they are mapped from."""

    tensors: dict[str, torch.Tensor]
    files: list[Path]


def open_checkpoint(path: Path) -> Checkpoint:
    """Map the tensors of a torch file, a safetensors file, or a folder with either.

    Args:
        path: `.pt`, `.pth`, `.bin` (bare or under "module") or `.safetensors`; or a folder with one such file, or with
            safetensors shards and their index.

    Raises:
        ValueError: if there is no such file, or it is empty, truncated, not a checkpoint, holds code, or has a key in
            two shards.
    """
    files = find_files(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        opened = read_torch(file) if file.suffix != ".safetensors" else read_safetensors(file)
        if twice := tensors.keys() & opened.keys():
            raise ValueError(f"keys of {path}: got {sorted(twice)} in two files, expected each key once")
        tensors |= opened
    return Checkpoint(tensors, files)


def find_files(path: Path) -> list[Path]:
    """The weight files behind a path: itself, or what the folder has (an index of shards first).

    Raises:
        ValueError: if there are none, or if a folder has several that no index joins.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"checkpoint: got {path}, which does not exist, expected a file or a folder")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        if absent := [name for name in names if not (path / name).is_file()]:
            raise ValueError(f"shards of {path}: got no {', '.join(absent)}, expected every file of {indices[0].name}")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors")) or [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if len(files) != 1:
        raise ValueError(
            f"weights in {path}: got {[file.name for file in files]}, expected one file, or shards with an index"
        )
    return files


def read_torch(file: Path) -> dict[str, torch.Tensor]:
    """Map a state dict that `torch.save` wrote.

    Raises:
        ValueError: as `open_checkpoint`.
    """
    with file.open("rb") as stream:
        magic = stream.read(len(ZIP_MAGIC))
    if magic != ZIP_MAGIC:
        raise ValueError(
            f"{file}: got a file that is no torch checkpoint{' (it is empty)' if not magic else ''}, expected what "
            f"torch.save has written since torch 1.6, or safetensors"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{file}: got a pickle with more than tensors in it, expected tensors only; nothing of it was run "
            f"({next((line.strip() for line in reason if 'GLOBAL' in line or 'Unsupported' in line), reason[0])})"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: got a truncated or damaged checkpoint ({error}), expected a whole one") from error

    if isinstance(content, dict) and isinstance(content.get("module"), dict):
        if others := sorted(str(key) for key in content if key != "module"):
            raise ValueError(f"{file}: got {others} beside 'module', expected the state dict alone under 'module'")
        content = content["module"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: got {type(content).__name__} without entries, expected a state dict of tensors")
    if others := sorted(str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)):
        raise ValueError(f"{file}: got entries that are no tensors ({', '.join(others)}), expected tensors only")
    return dict(content)


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Map a safetensors file, in the order in which the tensors lie in it.

    Raises:
        ValueError: if it is empty, truncated or something else.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: got a file that cannot be read ({error}), expected whole safetensors") from error


def meta_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shapes and dtypes alone."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and Inf. One pass, in pieces that stay in the processor's cache.

    Raises:
        ValueError: names the tensor and counts the numbers that are not finite.
    """
    for piece in tensor.reshape(-1).split(NUMBERS_AT_ONCE):
        if piece.numel() and not all(bound.isfinite() for bound in piece.aminmax()):
            wrong = sum(int((~part.isfinite()).sum()) for part in tensor.reshape(-1).split(NUMBERS_AT_ONCE))
            raise ValueError(f"{name}: got {wrong} numbers that are NaN or Inf, expected finite weights")


def write_safetensors(file: Path, layout: Mapping[str, torch.Tensor], build: Callable[[str], torch.Tensor]) -> None:
    """Write tensors one after the other, so that no more than one is ever held.

    `safetensors.torch.save_file` wants all of them at once, maps the file that it writes (a full disk then ends the
    process without an error), and takes more than twice as long.

    Args:
        file: what to write.
        layout: name, shape and dtype of each tensor, on the meta device.
        build: gives the tensor of a name, with that shape and dtype.
    """
    # Wide dtypes first, as safetensors does: every tensor is aligned to its own item size.
    names = sorted(layout, key=lambda name: -layout[name].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = layout[name]
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            stream.write(to_bytes(build(name)).numpy().data)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in the order of its elements, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compute_sha256(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, in hexadecimal, by file name."""
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
