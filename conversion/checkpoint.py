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
import mmap
import pickle
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode


SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
HEADER_LENGTH = struct.Struct("<Q")
ZIP_MAGIC = b"PK\x03\x04"
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
        names = read_shard_names(indices[0])
        if absent := [name for name in names if not (path / name).is_file()]:
            raise ValueError(f"shards of {path}: got no {', '.join(absent)}, expected every file of {indices[0].name}")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors")) or [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if len(files) != 1:
        raise ValueError(
            f"weights in {path}: got {[file.name for file in files]}, expected one file, or shards with an index"
        )
    return files


def read_shard_names(index: Path) -> list[str]:
    """Names of the files that an index of shards lists.

    Raises:
        ValueError: if the index is no JSON, or says nothing of files.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index}: got no JSON ({error}), expected an index of shards") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{index}: got no file names under 'weight_map', expected an index of shards")
    return sorted(set(weight_map.values()))


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
        with FakeTensorMode():  # shapes, and where the bytes lie
            content = torch.load(file, map_location="cpu", weights_only=True)
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
    check_entries(file, content)
    places = {}
    for name, tensor in content.items():
        storage = tensor.untyped_storage()
        if not hasattr(storage, "_checkpoint_offset"):
            raise ValueError(f"torch: got {torch.__version__}, expected 2.7 or newer, which says where a tensor lies")
        if storage._checkpoint_offset is None:
            raise ValueError(f"{file}: got {name} without data (saved on the meta device), expected numbers")
        start = storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
        places[name] = Place(tensor.dtype, tuple(tensor.shape), tensor.stride(), start)
    return map_tensors(file, places)


def check_entries(file: Path, content: Mapping[Any, Any]) -> None:
    """Refuse a state dict with entries that cannot be mapped, or cannot be written as safetensors.

    Raises:
        ValueError: lists the entries that are no tensors, not named by text, sparse, or of an unknown dtype.
    """
    if others := sorted(str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)):
        raise ValueError(f"{file}: got entries that are no tensors ({', '.join(others)}), expected tensors only")
    if others := sorted(repr(key) for key in content if not isinstance(key, str)):
        raise ValueError(f"{file}: got the keys {', '.join(others)}, expected text")
    if others := sorted(f"{key} {value.layout}" for key, value in content.items() if value.layout != torch.strided):
        raise ValueError(f"{file}: got {', '.join(others)}, expected dense tensors")
    if others := sorted(
        f"{key} {value.dtype}" for key, value in content.items() if value.dtype not in SAFETENSORS_DTYPES
    ):
        raise ValueError(f"{file}: got {', '.join(others)}, expected {', '.join(map(str, SAFETENSORS_DTYPES))}")


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Map a safetensors file, in the order in which the tensors lie in it.

    Raises:
        ValueError: if it is empty, truncated or something else, or holds a dtype that is no weight's.
    """
    try:
        with safe_open(
            file, framework="numpy"
        ) as opened:  # checks the header, and that the file is as long as it says
            found = {name: opened.get_slice(name) for name in opened.offset_keys()}
            kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: got a file that cannot be read ({error}), expected whole safetensors") from error
    dtypes = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
    if others := sorted(f"{name} {kind}" for name, (kind, _) in kinds.items() if kind not in dtypes):
        raise ValueError(f"{file}: got {', '.join(others)}, expected {', '.join(dtypes)}")
    with file.open("rb") as stream:
        start = HEADER_LENGTH.size + HEADER_LENGTH.unpack(stream.read(HEADER_LENGTH.size))[0]
    places = {}
    for name, (kind, shape) in kinds.items():
        meta = torch.empty(shape, dtype=dtypes[kind], device="meta")
        places[name] = Place(meta.dtype, shape, meta.stride(), start)
        start += meta.nbytes
    return map_tensors(file, places)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: `start` in bytes, `stride` in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


def map_tensors(file: Path, places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """Tensors that read from a file as they are used, and that cannot be written to.

    `torch.load(mmap=True)` maps the file writable and private, of which Linux grants no more than there is memory: a
    checkpoint of 28 GB could not be opened on a machine of 24 GB.

    Raises:
        ValueError: if the file ends before a tensor does.
    """
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, place in places.items():
        count = 1 + sum((size - 1) * step for size, step in zip(place.shape, place.stride, strict=True))
        if 0 in place.shape:
            tensors[name] = torch.empty(place.shape, dtype=place.dtype)
            continue
        if place.start + count * place.dtype.itemsize > len(memory):
            raise ValueError(f"{file}: got a file that ends within {name}, expected a whole one")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.start)
        tensors[name] = flat.as_strided(place.shape, place.stride)
    return tensors


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
        stream.write(HEADER_LENGTH.pack(len(encoded)) + encoded)
        for name in names:
            stream.write(to_bytes(build(name)).numpy().data)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in the order of its elements, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compute_sha256(files: Iterable[Path], folder: Path | None = None) -> dict[str, str]:
    """SHA-256 of each file, in hexadecimal, by its name, or by its path in `folder`."""
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            name = file.relative_to(folder).as_posix() if folder else file.name
            hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def start_sha256(files: Iterable[Path]) -> Future[dict[str, str]]:
    """`compute_sha256` beside other work; an error elsewhere does not wait for it to end, nor does the process."""
    hashes: Future[dict[str, str]] = Future()

    def run() -> None:
        try:
            hashes.set_result(compute_sha256(files))
        except BaseException as error:  # raised again where the result is asked for
            hashes.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return hashes
