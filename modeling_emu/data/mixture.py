"""A mixture of sources: which of them the next sample, or the next step's batch, comes from."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .encoding import EmuSampleEncoder
from .source import EmuSource, SourceStream


class EmuMixture(IterableDataset):
    """Samples of several sources, drawn by weight: an endless stream that any process can begin or resume anywhere.

    Everything drawn follows from the seed and a position. Ranks (`split`) and a DataLoader's workers read different
    shards. Resumption is exact in two ways: `state_dict` and `load_state_dict` in the process that iterates (a loader
    without workers, or torchdata's StatefulDataLoader), or iterating again and leaving out what came before, which is
    what Trainer does.

    Args:
        sources: at least one; their names must differ.
        weights: chance of each source, relative to the others; None draws all alike.
        batch_sizes: None yields one sample at a time, each from a source of its own draw. Otherwise a step's whole batch
            comes from one source, as published, and a list of so many samples is yielded; every rank draws the same
            source for the same step.
        encoder: yields `EncodedSample`s; None yields `Sample`s.
        seed: of the draws, of the order of shards, and of all that readers draw.
        repeat: begin a source again at its end. Otherwise it drops out, and the stream ends with the last one
            (for evaluation).

    Raises:
        ValueError: if the lists do not match, or weights or sizes are not positive.
    """

    def __init__(
        self,
        sources: Sequence[EmuSource],
        weights: Sequence[float] | None = None,
        batch_sizes: Sequence[int] | None = None,
        encoder: EmuSampleEncoder | None = None,
        seed: int = 0,
        repeat: bool = True,
    ):
        names = [source.name for source in sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: got names {names}, expected at least one, all different")
        for what, values in (("weights", weights), ("batch_sizes", batch_sizes)):
            if values is not None and (len(values) != len(names) or not all(value > 0 for value in values)):
                raise ValueError(f"{what}: got {list(values)}, expected {len(names)} positive numbers, one per source")
        self.sources = list(sources)
        self.weights = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
        self.batch_sizes = None if batch_sizes is None else list(batch_sizes)
        self.encoder = encoder
        self.seed = seed
        self.repeat = repeat
        self.rank, self.world_size = 0, 1
        self._resume_from: dict[str, Any] | None = None
        self._begin(0, 1)

    def split(self, rank: int, world_size: int) -> None:
        """Read this rank's part only. The loader must then not divide it again (accelerate's `prepare` would)."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, expected 0 to {world_size - 1}")
        self.rank, self.world_size = rank, world_size

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample, as plain numbers."""
        if self._resume_from is not None:
            return self._resume_from
        return {
            "num_draws": self._num_draws,
            "remaining": list(self._remaining),
            "streams": [stream.state_dict() for stream in self._streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that position when iterated next.

        Raises:
            ValueError: if it is of a mixture of another number of sources.
        """
        if len(state["streams"]) != len(self.sources):
            raise ValueError(f"state: got {len(state['streams'])} sources, expected {len(self.sources)}")
        self._resume_from = state

    def count_rows(self) -> dict[str, dict[str, int]]:
        """Per source the rows read so far and the broken ones among them, in the process that iterates."""
        return {
            stream.source.name: {"num_rows": stream.state["num_rows"], "num_broken": stream.state["num_broken"]}
            for stream in self._streams
        }

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self._begin(self.rank * num_workers + worker_id, self.world_size * num_workers)
        return self._draw(worker_id, num_workers)

    def _draw(self, worker_id: int, num_workers: int) -> Iterator[Any]:
        """The samples, or batches, of one reader."""
        iterators = [iter(stream) for stream in self._streams]
        while self._remaining:
            if self.batch_sizes is None:
                rng = random.Random(f"{self.seed}:{self.rank * num_workers + worker_id}:{self._num_draws}")
            else:
                rng = random.Random(f"{self.seed}:{self._num_draws * num_workers + worker_id}")
            [index] = rng.choices(self._remaining, [self.weights[remaining] for remaining in self._remaining])
            self._num_draws += 1
            taken = list(islice(iterators[index], 1 if self.batch_sizes is None else self.batch_sizes[index]))
            if taken:
                yield taken[0] if self.batch_sizes is None else taken
            else:
                self._remaining.remove(index)

    def _begin(self, reader: int, num_readers: int) -> None:
        """Set up one reader's streams at the start, or where a loaded state says."""
        self._streams = [
            SourceStream(source, self.seed, reader, num_readers, self.repeat, self.encoder) for source in self.sources
        ]
        self._num_draws, self._remaining = 0, list(range(len(self.sources)))
        if self._resume_from is not None:
            state, self._resume_from = self._resume_from, None
            self._num_draws, self._remaining = state["num_draws"], list(state["remaining"])
            for stream, stream_state in zip(self._streams, state["streams"], strict=True):
                stream.load_state_dict(stream_state)
