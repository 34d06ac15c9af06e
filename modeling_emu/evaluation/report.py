"""The report of a benchmark: shares of right answers with their intervals and baselines, as a table, Markdown and JSON."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.table import Table

CONFIDENCE = 0.95
COLUMNS = ("ability", "right", "share", f"{CONFIDENCE:.0%} interval", "baselines")
DERIVED = ("share", "interval")  # what JSON says of a figure for its reader, and what follows from the rest


def compute_wilson_interval(num_right: int, num_samples: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a share.

    Args:
        num_right: 0 to `num_samples`.
        num_samples: 1 or more.
        confidence: above 0 and below 1.

    Returns:
        Its two ends, 0 to 1.

    Raises:
        ValueError: if an argument is none of these.

    Source:
        E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not 0 <= num_right <= num_samples or num_samples < 1:
        raise ValueError(f"right answers: got {num_right} of {num_samples}, expected 0 to all of 1 or more")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_right / num_samples
    centre = share + z**2 / (2 * num_samples)
    half = z * math.sqrt(share * (1 - share) / num_samples + z**2 / (4 * num_samples**2))
    scale = 1 + z**2 / num_samples
    # At the ends, rounding would leave a share of 0 or 1 just outside of its own interval.
    low = 0.0 if num_right == 0 else (centre - half) / scale
    high = 1.0 if num_right == num_samples else (centre + half) / scale
    return low, high


@dataclass(frozen=True)
class Figure:
    """How often a model was right.

    Args:
        ability: what it was asked to do.
        criterion: what counts as right.
        num_right, num_samples: right answers, and all of them.
        baselines: name -> the share, 0 to 1, that is right without the ability.
        part: what of the answers is looked at, or which of the questions; "" for all.
    """

    ability: str
    criterion: str
    num_right: int
    num_samples: int
    baselines: dict[str, float] = field(default_factory=dict)
    part: str = ""

    @property
    def share(self) -> float:
        """Right answers of all, 0 to 1."""
        return self.num_right / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the share."""
        return compute_wilson_interval(self.num_right, self.num_samples)

    def list_cells(self) -> list[str]:
        """What a table says of it, under `COLUMNS`."""
        low, high = self.interval
        return [
            self.part or self.ability,
            f"{self.num_right} / {self.num_samples}",
            f"{self.share:.1%}",
            f"{low:.1%} to {high:.1%}",
            ", ".join(f"{name} {share:.1%}" for name, share in self.baselines.items()),
        ]


@dataclass(frozen=True)
class Report:
    """The figures of a benchmark.

    Args:
        task: its name, as `emu evaluate` knows it.
        settings: what the figures depend on beside the model, such as the seed; numbers and texts.
        baselines: name -> what it does.
        figures: in order; the parts of an ability after the figure of all of it.
    """

    task: str
    settings: dict[str, Any]
    baselines: dict[str, str]
    figures: list[Figure]

    def get(self, ability: str, part: str = "") -> Figure:
        """One figure.

        Raises:
            ValueError: if there is none.
        """
        for figure in self.figures:
            if (figure.ability, figure.part) == (ability, part):
                return figure
        names = [(figure.ability, figure.part) for figure in self.figures]
        raise ValueError(f"figure: got {(ability, part)}, expected one of {names}")

    def to_json(self) -> str:
        """The report as JSON, with the shares and intervals of its figures."""
        figures = [asdict(figure) | {name: getattr(figure, name) for name in DERIVED} for figure in self.figures]
        return json.dumps(asdict(self) | {"figures": figures}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote."""
        fields = json.loads(text)
        figures = [
            Figure(**{name: value for name, value in entry.items() if name not in DERIVED})
            for entry in fields.pop("figures")
        ]
        return cls(**fields, figures=figures)

    def describe_settings(self) -> str:
        """The settings in a line."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())

    def to_table(self) -> "Table":
        """The report as a table for the terminal, parts indented."""
        from rich.table import Table

        table = Table(*COLUMNS, box=None, title=f"{self.task}: {self.describe_settings()}", title_justify="left")
        for figure in self.figures:
            name, *cells = figure.list_cells()
            table.add_row(f"  {name}" if figure.part else name, *cells, style="dim" if figure.part else None)
        return table

    def to_markdown(self) -> str:
        """The report for a model card: a table of abilities, one of their parts, and what the baselines are."""
        abilities = [figure for figure in self.figures if not figure.part]
        parts = [figure for figure in self.figures if figure.part]
        lines = [f"`emu evaluate {self.task}`: {self.describe_settings()}.", ""]
        lines += make_rows(
            (*COLUMNS, "what counts as right"), ([*figure.list_cells(), figure.criterion] for figure in abilities)
        )
        if parts:
            lines += ["", "In parts:", ""]
            lines += make_rows(
                ("ability", "part", *COLUMNS[1:], "what counts as right"),
                ([figure.ability, *figure.list_cells(), figure.criterion] for figure in parts),
            )
        lines += ["", "Baselines:", ""]
        lines += [f"- {name}: {what}" for name, what in self.baselines.items()]
        return "\n".join(lines) + "\n"


def make_rows(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    names = list(header)
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]
