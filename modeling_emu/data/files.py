"""Shards to rows: tars, parquet, JSON, JSON lines and metadata files, local or remote, read in memory.

`datasets` finds and opens the files (`hf://`, `https://` and the rest, with its retries). The rows are read here, since
its builders stop at the first broken one; here it is named, and reading goes on after it. Nothing is written to disk.
"""

import csv
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import resolve_pattern
from datasets.utils.file_utils import xopen


PARQUET_BATCH = 32
TAR_BLOCK = 512
READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, pa.ArrowException, csv.Error)


class BrokenRow:
    """What stands for a row that cannot be read.

    Args:
        reason: what is wrong with it.
    """

    def __init__(self, reason: str):
        self.reason = reason


Rows = Iterator[tuple[str, dict[str, Any] | BrokenRow]]


def find_shards(patterns: str | list[str]) -> list[str]:
    """The files of a source in a fixed order.

    Args:
        patterns: paths, globs or URLs of shards; a folder stands for its `metadata.csv`, `.jsonl` or `.parquet`.

    Raises:
        ValueError: if a pattern matches nothing, or a file of another kind.
    """
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = []
        for candidate in (pattern, f"{pattern.rstrip('/')}/metadata.*"):
            try:
                found = resolve_pattern(candidate, base_path=".")
                break
            except FileNotFoundError:
                continue
        if not found:
            raise ValueError(f"files of a source: got {pattern!r}, which matches nothing; expected files or a folder")
        shards += sorted(found)
    for shard in shards:
        get_format(shard)
    return shards


def get_format(shard: str) -> str:
    """Which reader a shard needs, "tar", "parquet", "json" or "csv", by the ending of the name, that of a compressed file included.

    Raises:
        ValueError: for another ending.
    """
    formats = {"tar": "tar", "parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv"}
    endings = [ending for ending in shard.rsplit("/", 1)[-1].lower().split(".")[1:] if ending not in ("gz", "zip")]
    if not endings or endings[-1] not in formats:
        raise ValueError(f"shard: got {shard!r}, expected .tar, .parquet, .json, .jsonl or .csv (.gz, .zip)")
    return formats[endings[-1]]


def read_shard(shard: str) -> Rows:
    """The rows of a shard with their keys; in place of what cannot be read, a `BrokenRow`.

    A damage that hides where the next row begins ends the shard.
    """
    readers = {"tar": read_tar, "parquet": read_parquet, "json": read_json, "csv": read_csv}
    key = shard
    try:
        with open_file(shard) as file:
            for name, fields in readers[get_format(shard)](file):
                key = f"{shard}:{name}"
                yield key, fields
    except READ_ERRORS as error:
        yield f"{shard} (after {key})" if key != shard else shard, BrokenRow(f"{error!r}, the shard's rest is lost")


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file or URL for reading bytes, decompressed where its name ends in .gz or .zip."""
    with xopen(path, "rb") as raw:
        if path.endswith(".gz"):
            with gzip.open(raw) as file:
                yield cast(BinaryIO, file)
        elif path.endswith(".zip"):
            with zipfile.ZipFile(raw) as archive:
                names = archive.namelist()
                if len(names) != 1:
                    raise ValueError(f"{path}: got {len(names)} files in it, expected one")
                with archive.open(names[0]) as member:
                    yield cast(BinaryIO, member)
        else:
            yield raw


def is_safe_name(name: str) -> bool:
    """Whether a name stays inside its archive or folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not (path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")))


def read_tar(file: BinaryIO) -> Rows:
    """Neighbouring members with the same name up to its first dot are one row, their endings its columns."""
    with tarfile.open(fileobj=file, mode="r:*") as tar:
        key, fields = "", cast(dict[str, Any], {})
        for member in tar:
            if member.isdir():
                continue
            if not member.isfile() or not is_safe_name(member.name):
                yield member.name, BrokenRow("a member that is no file, or whose name leads out of the archive")
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            member_key = f"{folder}/{stem}" if folder else stem
            if member_key != key and fields:
                yield key, fields
                fields = {}
            key = member_key
            content = tar.extractfile(member)
            fields[ending.lower()] = content.read() if content is not None else b""
        if fields:
            yield key, fields
        check_end_of_tar(tar)


def check_end_of_tar(tar: tarfile.TarFile) -> None:
    """Tell a tar's end from a damaged header, at which `tarfile` stops without a word."""
    archive = cast(BinaryIO, tar.fileobj)
    archive.seek(tar.offset)
    block = archive.read(TAR_BLOCK)
    if block.count(0) != TAR_BLOCK:
        raise ValueError(
            f"tar: got {'a damaged header' if block else 'no end'} at byte {tar.offset}, expected its end"
        )


def read_tar_member(path: str, name: str) -> bytes | None:
    """The bytes of one member of an uncompressed tar, in memory; None if there is no such tar or member."""
    try:
        place = index_tar(path).get(name)
    except FileNotFoundError:
        return None
    if place is None:
        return None
    with xopen(path, "rb") as file:
        file.seek(place[0])
        return cast(bytes, file.read(place[1]))


@lru_cache(maxsize=4)
def index_tar(path: str) -> dict[str, tuple[int, int]]:
    """Where each file of an uncompressed tar begins, and its bytes."""
    with xopen(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}


def read_parquet(file: BinaryIO) -> Rows:
    """A row per row, by its number."""
    number = 0
    for batch in pq.ParquetFile(file).iter_batches(batch_size=PARQUET_BATCH):
        for fields in batch.to_pylist():
            yield str(number), fields
            number += 1


def read_json(file: BinaryIO) -> Rows:
    """A row per line, or, in a file that is one list, per entry; by its number from 0."""
    for number, line in enumerate(file):
        if number == 0 and line.lstrip().startswith(b"["):
            for entry, fields in enumerate(json.loads(line + file.read())):
                yield str(entry), check_object(fields)
            return
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            yield str(number), BrokenRow(f"line is no JSON: {error}")
            continue
        yield str(number), check_object(fields)


def check_object(fields: Any) -> dict[str, Any] | BrokenRow:
    """A JSON value where a row stands."""
    return fields if isinstance(fields, dict) else BrokenRow(f"got {str(fields)[:80]!r}, expected a JSON object")


def read_csv(file: BinaryIO) -> Rows:
    """A row per line after the line of column names, by its number."""
    for number, fields in enumerate(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))):
        yield str(number), cast(dict[str, Any], fields)
