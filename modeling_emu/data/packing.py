"""Packing: several documents in one row, none of them cut, and rows as full as they get."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from .encoding import EncodedSample
from .mixture import EmuMixture


FILL_TO_TRY = 0.8  # of a window's capacity: below it, one more document is taken without packing on trial


class PackedDocuments(IterableDataset):
    """Rows of documents, each row at most the encoder's `max_length` tokens.

    A window of documents is gathered until one more would not go into `num_rows` rows, and packed, largest first, each
    into the fullest row with room. `EmuDataCollator` keeps attention and targets of a row's documents apart.

    Args:
        mixture: with an encoder, drawing per sample.
        num_rows: rows of a window. More of them are fuller, and hold more images in memory.

    Raises:
        ValueError: if the mixture has no encoder, or draws a batch per step.
    """

    def __init__(self, mixture: EmuMixture, num_rows: int = 8):
        if mixture.encoder is None:
            raise ValueError("mixture: got no encoder, expected one, since rows are measured in tokens")
        if mixture.batch_sizes is not None:
            raise ValueError("mixture: got batch_sizes, expected a mixture that draws per sample")
        if num_rows < 1:
            raise ValueError(f"num_rows: got {num_rows}, expected at least 1")
        self.mixture = mixture
        self.max_length = mixture.encoder.max_length
        self.num_rows = num_rows
        self._window_start = mixture.state_dict()
        self._num_yielded = 0
        self._is_loaded = False

    def split(self, rank: int, world_size: int) -> None:
        """See `EmuMixture.split`."""
        self.mixture.split(rank, world_size)

    def count_rows(self) -> dict[str, dict[str, int]]:
        """See `EmuMixture.count_rows`."""
        return self.mixture.count_rows()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row: where its window began, and how many of its rows are done."""
        return {"window_start": self._window_start, "num_yielded": self._num_yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that position when iterated next; the window is read again for it."""
        self._window_start, self._num_yielded, self._is_loaded = state["window_start"], state["num_yielded"], True
        self.mixture.load_state_dict(state["window_start"])

    def __iter__(self) -> Iterator[list[EncodedSample]]:
        documents = iter(self.mixture)
        if not self._is_loaded:
            self._window_start, self._num_yielded = self.mixture.state_dict(), 0
        self._is_loaded = False
        return self._pack(documents)

    def _pack(self, documents: Iterator[EncodedSample]) -> Iterator[list[EncodedSample]]:
        """Gather windows and yield their rows."""
        window: list[EncodedSample] = []
        before = self._window_start
        for document in documents:
            if not self._has_room([*window, document]):
                yield from self._yield_window(window)
                window, self._window_start, self._num_yielded = [], before, 0
            window.append(document)
            before = self.mixture.state_dict()
        yield from self._yield_window(window)

    def _yield_window(self, window: list[EncodedSample]) -> Iterator[list[EncodedSample]]:
        """The rows of a window that have not been yielded yet."""
        rows = pack([len(document.input_ids) for document in window], self.max_length)
        for row in rows[self._num_yielded :]:
            self._num_yielded += 1
            yield [window[index] for index in row]

    def _has_room(self, window: Sequence[EncodedSample]) -> bool:
        """Whether a window's documents go into its rows."""
        lengths = [len(document.input_ids) for document in window]
        capacity = self.num_rows * self.max_length
        if sum(lengths) > capacity:
            return False
        return sum(lengths) <= FILL_TO_TRY * capacity or len(pack(lengths, self.max_length)) <= self.num_rows


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which documents share a row: largest first, each into the fullest row with room.

    Args:
        lengths: of the documents, each at most `max_length`.

    Returns:
        The documents' indices, in each row in their order; rows by their first document.

    Raises:
        ValueError: if a document is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if length > max_length:
            raise ValueError(f"document {index}: got {length} tokens, expected at most {max_length}")
        fitting = [row for row in range(len(rows)) if room[row] >= length]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
        else:
            row = len(rows)
            rows.append([])
            room.append(max_length)
        rows[row].append(index)
        room[row] -= length
    return sorted(sorted(row) for row in rows)
