"""Embeddings and latents computed once: safetensors shards that the decoder's trainer reads instead of the models.

A folder holds `fingerprint.json` (what it was made from), `null_embeds.safetensors`, one file per shard, and at the end
`index.json`. A shard of pictures without a VAE holds their pixels. Its header has the names of its samples, and where in
the source the next one begins, so that an interrupted computation goes on there.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ..data import EmuMixture
from .decoder_data import DecoderBatch, DecoderEncoder, DecoderSample, DecoderStream, scale_pixels


logger = logging.getLogger(__name__)

FINGERPRINT_FILE, INDEX_FILE, NULL_FILE = "fingerprint.json", "index.json", "null_embeds.safetensors"
SAMPLES_PER_SHARD = 1024
DRAWS_PER_BLOCK = 1 << 16
END_BYTES = 1 << 16  # at each end of a source's file
ORDER, CHOICE = 0, 1  # what numbers are drawn for, beside the seed


def hash_weights(folder: Path) -> str:
    """SHA-256 over the tensors of a network, however its files divide them and whoever wrote them.

    Raises:
        ValueError: if there are no safetensors in the folder.
    """
    files: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    if not files:
        raise ValueError(f"weights: got no *.safetensors in {folder}, expected at least one")
    digest = hashlib.sha256()
    for name in sorted(files):
        with safe_open(files[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_files(files: list[str]) -> str:
    """SHA-256 over what tells files apart at little cost: of a local one its name, its size and both its ends.

    Of a remote one it is the address alone. A change in the middle of a file that keeps its size is not seen.
    """
    digest = hashlib.sha256()
    for name in files:
        if "://" in name:
            digest.update(name.encode())
            continue
        path = Path(name)
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(END_BYTES))
            file.seek(max(size - END_BYTES, 0))
            digest.update(file.read())
    return digest.hexdigest()


def check_fingerprint(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Write what a new folder's shards are made from; refuse a folder that was made from something else.

    Args:
        fingerprint: JSON values by what they say.

    Raises:
        ValueError: naming what differs.
    """
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"precomputed: got {folder}, which holds other things, expected a new or an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(fingerprint, indent=2).encode())
        return
    found = json.loads(file.read_text())
    wanted = json.loads(json.dumps(fingerprint))
    if differing := [name for name in wanted if found.get(name) != wanted[name]]:
        raise ValueError(
            f"precomputed {folder}: got shards of another {', '.join(differing)} "
            f"({'; '.join(f'{name} {found.get(name)}, now {wanted[name]}' for name in differing)}), expected the same "
            f"(give a new folder)"
        )


def replace_file(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def is_complete_cache(folder: Path) -> bool:
    """Whether all sources have been computed."""
    return (folder / INDEX_FILE).is_file()


class ShardWriter:
    """Computes one rank's shards of one source, from where it was interrupted.

    Args:
        folder: of all shards.
        source: its number in the recipe.
        rank: of this process.
        world_size: number of processes, the same until the source is done.
    """

    def __init__(self, folder: Path, source: int, rank: int, world_size: int):
        self.folder = folder
        self.stem = f"shard-{source:03d}-{rank:05d}"
        self.rank, self.world_size = rank, world_size

    def write(
        self, encoder: DecoderEncoder, stream: DecoderStream, batch_size: int, samples_per_shard: int
    ) -> list[tuple[str, int]]:
        """Compute what is missing; gives all shards, with their numbers of samples.

        Args:
            encoder: the frozen models.
            stream: of a mixture that ends.

        Raises:
            ValueError: if an interrupted computation ran in another number of processes.
        """
        shards, state = self._find_shards()
        mixture = stream.mixture
        mixture.split(self.rank, self.world_size)
        if state is not None:
            mixture.load_state_dict(state)
        samples = iter(stream)
        while batches := self._encode_shard(encoder, samples, batch_size, samples_per_shard):
            name = f"{self.stem}-{len(shards):05d}.safetensors"
            shards.append((name, sum(len(keys) for _, keys in batches)))
            self._write_shard(name, batches, mixture)
            logger.info("precomputed %s: %d samples", name, shards[-1][1])
        return shards

    def _find_shards(self) -> tuple[list[tuple[str, int]], dict[str, Any] | None]:
        """The shards that are there, and the state of the mixture after the last of them."""
        shards, state = [], None
        for file in sorted(self.folder.glob(f"{self.stem}-*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata()
            if int(header["world_size"]) != self.world_size:
                raise ValueError(
                    f"processes: got {self.world_size} to go on with shards of {header['world_size']}, expected as many"
                )
            shards.append((file.name, len(json.loads(header["keys"]))))
            state = json.loads(header["state"])
        return shards, state

    def _encode_shard(
        self, encoder: DecoderEncoder, samples: Iterator[DecoderSample], batch_size: int, samples_per_shard: int
    ) -> list[tuple[dict[str, torch.Tensor], list[str]]]:
        """Tensors and keys of the next batches, as many as go into a shard."""
        batches: list[tuple[dict[str, torch.Tensor], list[str]]] = []
        num_left = samples_per_shard
        while num_left > 0 and (chosen := list(islice(samples, min(batch_size, num_left)))):
            batch = encoder(chosen)
            tensors = {"image_embeds": batch.image_embeds.to(encoder.pipeline.multimodal_encoder.dtype)}
            if encoder.pipeline.vae is None:
                tensors["pixels"] = torch.stack([sample.pixels for sample in chosen])
            else:
                tensors |= {"latents_mean": batch.latents_mean, "latents_std": batch.latents_std}
            batches.append(({name: tensor.cpu() for name, tensor in tensors.items()}, batch.keys))
            num_left -= len(chosen)
        return batches

    def _write_shard(
        self, name: str, batches: list[tuple[dict[str, torch.Tensor], list[str]]], mixture: EmuMixture
    ) -> None:
        tensors = {key: torch.cat([batch[key] for batch, _ in batches]) for key in batches[0][0]}
        header = {
            "keys": json.dumps([key for _, keys in batches for key in keys]),
            "state": json.dumps(mixture.state_dict()),
            "world_size": str(self.world_size),
        }
        partial = self.folder / f".{name}.partial"
        save_file(tensors, partial, metadata=header)
        partial.replace(self.folder / name)


def write_null_embeds(folder: Path, encoder: DecoderEncoder) -> None:
    """Keep what stands for a condition that is dropped."""
    partial = folder / f".{NULL_FILE}.partial"
    save_file({"null_embeds": encoder.null_embeds.cpu().contiguous()}, partial)
    partial.replace(folder / NULL_FILE)


def write_index(folder: Path, num_sources: int) -> None:
    """Say that all shards of all sources are there, and how many samples each has.

    Raises:
        ValueError: if a source gave no sample.
    """
    index: list[list[tuple[str, int]]] = []
    for source in range(num_sources):
        shards = []
        for file in sorted(folder.glob(f"shard-{source:03d}-*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                shards.append((file.name, len(json.loads(opened.metadata()["keys"]))))
        if not shards:
            raise ValueError(f"source {source} of the recipe: got no sample with a picture, expected at least one")
        index.append(shards)
    replace_file(folder / INDEX_FILE, json.dumps(index, indent=1).encode())


class PrecomputedDecoderData(Dataset):
    """Batches from shards, without any model; see `DecoderData`.

    The sources are drawn by weight, and each is gone through again and again, in a new order every time. What the n-th
    sample is depends on the seed alone: any split into batches and processes reads the same samples for a step.

    Args:
        folder: a complete one.
        weights: chance of each source, relative to the others.
        seed: of all draws.

    Raises:
        ValueError: if the folder is not complete, or has another number of sources.
    """

    def __init__(self, folder: Path, weights: list[float], seed: int):
        if not is_complete_cache(folder):
            raise ValueError(f"precomputed {folder}: got no {INDEX_FILE}, expected the shards of all sources")
        self.folder = folder
        self.shards: list[list[tuple[str, int]]] = json.loads((folder / INDEX_FILE).read_text())
        if len(weights) != len(self.shards):
            raise ValueError(f"weights: got {len(weights)}, expected {len(self.shards)}, one per source")
        self.ends = [np.cumsum([count for _, count in shards]) for shards in self.shards]
        self.sizes = [int(ends[-1]) for ends in self.ends]
        self.weights = np.array(weights) / sum(weights)
        self.seed = seed
        with safe_open(folder / NULL_FILE, framework="pt") as opened:
            self.null_embeds = opened.get_tensor("null_embeds")
        self._opened: dict[str, tuple[dict[str, torch.Tensor], list[str]]] = {}

    def read(
        self, batch_size: int, first_batch: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[DecoderBatch]:
        """See `DecoderData`. A step's samples are divided among the ranks."""
        chunks = self._draw_chunks(batch_size, first_batch * world_size)
        mine = islice(chunks, rank, None, world_size)
        loader = DataLoader(
            self,
            batch_size=None,  # places come in batches already
            sampler=mine,
            collate_fn=keep,
            num_workers=num_workers,
            generator=torch.Generator(),  # or it would draw from the run's random numbers
        )
        return iter(loader)

    def _draw_chunks(self, size: int, first: int) -> Iterator[list[tuple[int, int]]]:
        """Places of samples, in groups of `size`, from the group `first` on."""
        places = self.draw_places(first * size)
        while True:
            yield list(islice(places, size))

    def draw_places(self, first: int) -> Iterator[tuple[int, int]]:
        """Source and number within it, of the sample `first` and all that follow."""
        num_drawn = [0] * len(self.sizes)

        @lru_cache(maxsize=2 * len(self.sizes))
        def get_order(source: int, epoch: int) -> torch.Tensor:
            rng = np.random.default_rng([self.seed, ORDER, source, epoch])
            return torch.from_numpy(rng.permutation(self.sizes[source]))

        for block in itertools.count():
            rng = np.random.default_rng([self.seed, CHOICE, block])
            draws = rng.choice(len(self.sizes), DRAWS_PER_BLOCK, p=self.weights).tolist()
            num_left_out = min(max(first - block * DRAWS_PER_BLOCK, 0), DRAWS_PER_BLOCK)
            for source in draws[:num_left_out]:
                num_drawn[source] += 1
            for source in draws[num_left_out:]:
                epoch, place = divmod(num_drawn[source], self.sizes[source])
                num_drawn[source] += 1
                yield source, int(get_order(source, epoch)[place])

    def __getitem__(self, places: list[tuple[int, int]]) -> DecoderBatch:
        rows: dict[str, list[torch.Tensor]] = {}
        keys = []
        for source, number in places:
            shard = int(np.searchsorted(self.ends[source], number, side="right"))
            row = number - (int(self.ends[source][shard - 1]) if shard else 0)
            tensors, names = self._open(self.shards[source][shard][0])
            for name, tensor in tensors.items():
                rows.setdefault(name, []).append(tensor[row])
            keys.append(names[row])
        stacked = {name: torch.stack(values) for name, values in rows.items()}
        if "pixels" in stacked:
            stacked["latents_mean"] = scale_pixels(stacked.pop("pixels"))
            stacked["latents_std"] = torch.zeros_like(stacked["latents_mean"])
        return DecoderBatch(**{name: tensor.float() for name, tensor in stacked.items()}, keys=keys)

    def _open(self, name: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Tensors of a shard, mapped and not read, and the keys of its samples."""
        if name not in self._opened:
            with safe_open(self.folder / name, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                self._opened[name] = tensors, json.loads(opened.metadata()["keys"])
        return self._opened[name]


def keep(batch: Any) -> Any:
    """Leave a batch as it is, where a DataLoader would make tensors of it."""
    return batch
