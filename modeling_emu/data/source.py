"""A source: shards of one kind, read again and again in an order that its seed gives, from any point."""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

from .encoding import EmuSampleEncoder
from .files import BrokenRow, find_shards, read_shard
from .instructions import read_instruction
from .interleaved import read_mmc4, read_obelics, read_storyboard
from .pairs import read_image_text, read_video_text
from .samples import Document, Media, Row, Sample


logger = logging.getLogger(__name__)

KINDS: dict[str, Callable[[Row], Sample]] = {
    "image_text": read_image_text,
    "video_text": read_video_text,
    "mmc4": read_mmc4,
    "obelics": read_obelics,
    "storyboard": read_storyboard,
    "instruction": read_instruction,
}
KINDS_IN_TOKENS = ("mmc4",)
NUM_ROWS_TO_JUDGE = 100  # before so many rows, the fraction of broken ones says nothing yet


class EmuSource:
    """Where documents of one kind come from.

    Args:
        kind: one of `KINDS`, each described in its reader.
        files: paths, globs or URLs of the shards (.tar, .parquet, .json, .jsonl, .csv, also .gz or .zip); a folder stands
            for its metadata file (imagefolder).
        media: folder of the images and videos that rows name, or of one tar per shard; None is the shard's own folder.
        name: what logs call it; None takes the kind.
        max_broken_fraction: of the rows read, how many may be broken before the run stops. A whole shard counts as one.

    Raises:
        ValueError: for an unknown kind, a fraction outside [0, 1], or files that match nothing.
    """

    def __init__(
        self,
        kind: str,
        files: str | list[str],
        media: str | None = None,
        name: str | None = None,
        max_broken_fraction: float = 0.05,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind of a source: got {kind!r}, expected one of {sorted(KINDS)}")
        if not 0 <= max_broken_fraction <= 1:
            raise ValueError(f"max_broken_fraction: got {max_broken_fraction}, expected 0 to 1")
        self.kind = kind
        self.name = name or kind
        self.shards = find_shards(files)
        self.media = media
        self.max_broken_fraction = max_broken_fraction

    def order_shards(self, seed: int, epoch: int) -> list[int]:
        """The numbers of the shards in the order of an epoch."""
        numbers = list(range(len(self.shards)))
        random.Random(f"{seed}:{self.name}:{epoch}").shuffle(numbers)
        return numbers


class SourceStream:
    """One reader's part of a source: an iterator of samples that can be saved and set back, row by row.

    Of `num_readers`, each reads its own shards; where there are fewer shards than readers, its own rows of all shards.

    Args:
        source: what to read.
        seed: of the order of shards and of all that the readers draw.
        reader: which of the readers this is, from 0.
        num_readers: how many there are: ranks times workers.
        repeat: begin again at the end.
        encoder: encodes each sample, which may give several pieces; None gives `Sample`s.

    Raises:
        ValueError: if the kind measures in tokens and there is no encoder.
    """

    def __init__(
        self,
        source: EmuSource,
        seed: int,
        reader: int = 0,
        num_readers: int = 1,
        repeat: bool = True,
        encoder: EmuSampleEncoder | None = None,
    ):
        if source.kind in KINDS_IN_TOKENS and encoder is None:
            raise ValueError(
                f"source {source.name}: got no encoder, expected one, which measures {source.kind} in tokens"
            )
        self.source = source
        self.seed = seed
        self.reader = reader
        self.num_readers = num_readers
        self.repeat = repeat
        self.encoder = encoder
        # The next row, and of it the next piece; the counts are of the whole run.
        self.state = {"epoch": 0, "shard": 0, "row": 0, "piece": 0, "num_rows": 0, "num_broken": 0}

    def state_dict(self) -> dict[str, int]:
        """The position after the last sample, as plain numbers."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that position; to be called before iterating."""
        self.state = dict(state)

    def __iter__(self) -> Iterator[Any]:
        state = self.state
        while True:
            is_whole_pass = state["shard"] == state["row"] == 0
            num_rows_before = state["num_rows"] - state["num_broken"]
            yield from self._read_epoch()
            self._check_broken(min_rows=1)
            if not self.repeat:
                return
            if is_whole_pass and state["num_rows"] - state["num_broken"] == num_rows_before:
                raise ValueError(
                    f"source {self.source.name}: got no sample in a whole pass of reader {self.reader} of "
                    f"{self.num_readers}, expected at least one"
                )
            state.update(epoch=state["epoch"] + 1, shard=0, row=0)

    def _read_epoch(self) -> Iterator[Any]:
        """The rest of this epoch, from the saved position on."""
        state = self.state
        numbers = self.source.order_shards(self.seed, state["epoch"])
        by_shard = len(numbers) >= self.num_readers
        if by_shard:
            numbers = numbers[self.reader :: self.num_readers]
        while state["shard"] < len(numbers):
            number = numbers[state["shard"]]
            first = state["row"]
            for index, (key, fields) in enumerate(read_shard(self.source.shards[number])):
                if index < first or not (by_shard or index % self.num_readers == self.reader):
                    continue
                state["row"] = index
                pieces = self._read_row(number, index, key, fields)
                for piece in pieces[state["piece"] :]:
                    state["piece"] += 1
                    if state["piece"] == len(pieces):
                        state.update(row=index + 1, piece=0)
                    yield piece
                state["row"] = index + 1
            state.update(shard=state["shard"] + 1, row=0)

    def _read_row(self, number: int, index: int, key: str, fields: dict[str, Any] | BrokenRow) -> list[Any]:
        """The samples of a row of the shard with this number; none where it is broken, which is logged and counted."""
        is_new = self.state["piece"] == 0
        self.state["num_rows"] += is_new
        try:
            if isinstance(fields, BrokenRow):
                raise ValueError(fields.reason)
            row = Row(
                fields,
                key,
                Media(self.source.shards[number], self.source.media),
                random.Random(f"{self.seed}:{self.source.name}:{self.state['epoch']}:{number}:{index}"),
                self._count_tokens,
            )
            sample = KINDS[self.source.kind](row)
            return self.encoder(sample) if self.encoder else [sample]
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # a row from the web can be wrong in any way: a missing column, another type
            self.state["num_broken"] += is_new
            logger.warning(
                "source %s: broken row %s is left out (%d of %d so far): %s",
                self.source.name,
                key,
                self.state["num_broken"],
                self.state["num_rows"],
                describe_error(error),
            )
            self._check_broken(min_rows=NUM_ROWS_TO_JUDGE)
            return []

    def _count_tokens(self, document: Document) -> int:
        """The length of a document; kinds that ask for it have an encoder."""
        if self.encoder is None:
            raise ValueError(f"kind {self.source.kind}: got no encoder, expected one to measure in tokens")
        return self.encoder.count_document_tokens(document)

    def _check_broken(self, min_rows: int) -> None:
        """Stop a run whose source is broken, once enough rows have been read to tell."""
        num_rows, num_broken = self.state["num_rows"], self.state["num_broken"]
        limit = self.source.max_broken_fraction
        if num_rows >= min_rows and num_broken > limit * num_rows:
            raise BrokenSourceError(
                f"source {self.source.name}: got {num_broken} broken rows of {num_rows}, expected at most a fraction "
                f"of {limit} (max_broken_fraction); the log names each"
            )


class BrokenSourceError(ValueError):
    """Too many rows of a source are broken."""


def describe_error(error: Exception) -> str:
    """An error for the log: its message, with its kind where the message alone does not say it."""
    return str(error) if type(error) is ValueError else repr(error)
