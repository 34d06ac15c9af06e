"""The report: what was measured over the seeds, as a table and as a plot."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from modeling_emu.evaluation.report import make_rows

from .arms import ARMS
from .measuring import ABILITY_NAMES, LOSS_NAMES


NOTHING = "–"  # noqa: RUF001

# Pixels of the plot, which is drawn larger and made smaller, for smooth edges.
OVERSAMPLING = 2
MARGIN, LABEL_WIDTH, PANEL_WIDTH, PANEL_GAP, HEADER_HEIGHT, ROW_HEIGHT, FOOTER_HEIGHT = 24, 150, 210, 34, 34, 34, 54
FONT_SIZE, TITLE_SIZE = 14, 15
INK, PALE_INK, GRID, MARK, DOT = "#1f2328", "#6e7781", "#d8dee4", "#0a3069", "#218bff"
DOT_RADIUS, MEAN_HEIGHT = 4, 16


@dataclass(frozen=True)
class Spread:
    """A measured number over the seeds.

    Args:
        values: one per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of all seeds."""
        return fmean(self.values)

    def describe(self, form: str) -> str:
        """The mean, and from where to where; each number in this form."""
        mean, low, high = (format(value, form) for value in (self.mean, min(self.values), max(self.values)))
        return f"{mean} ({low} to {high})" if len(self.values) > 1 else mean


def summarise(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Arm -> what was measured -> its values; shares are 0 to 1."""
    values: dict[str, defaultdict[str, list[float]]] = {}
    for result in results:
        measured = {name: figure["num_right"] / figure["num_samples"] for name, figure in result["figures"].items()}
        for name, value in (measured | result["losses"]).items():
            values.setdefault(result["arm"], defaultdict(list))[name].append(value)
    return {
        arm: {name: Spread(tuple(entries)) for name, entries in measured.items()} for arm, measured in values.items()
    }


def make_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per arm, shares and losses as the mean over seeds with its range.

    Raises:
        ValueError: if there are no results, or such of different settings.
    """
    check_results(results)
    rows = []
    for arm, measured in summarise(results).items():
        cells = [measured[name].describe(".1%") if name in measured else NOTHING for name in ABILITY_NAMES]
        cells += [measured[name].describe(".4f") if name in measured else NOTHING for name in LOSS_NAMES]
        num_seeds = sum(result["arm"] == arm for result in results)
        rows.append([arm, str(num_seeds), *cells, ARMS[arm].what])
    lines = make_rows(["arm", "seeds", *ABILITY_NAMES, *LOSS_NAMES, "what it is"], rows)
    settings = ", ".join(f"{name} {value}" for name, value in results[0]["settings"].items())
    return "\n".join([f"Mean over seeds (least to greatest); {settings}.", "", *lines]) + "\n"


def check_results(results: Sequence[dict[str, Any]]) -> None:
    """Refuse what cannot stand in one table."""
    settings = [result["settings"] for result in results]
    if not settings or any(entry != settings[0] for entry in settings):
        raise ValueError(f"results: got {len(settings)} with settings {settings}, expected some, all of the same")


def draw_plot(results: Sequence[dict[str, Any]]) -> Image.Image:
    """One panel per share, one row per arm: a dot for each seed, a bar for their mean, over the range from 0 to 100 %.

    Raises:
        ValueError: as `make_table`.
    """
    check_results(results)
    summary = summarise(results)
    width = 2 * MARGIN + LABEL_WIDTH + len(ABILITY_NAMES) * (PANEL_WIDTH + PANEL_GAP) - PANEL_GAP
    height = 2 * MARGIN + HEADER_HEIGHT + len(summary) * ROW_HEIGHT + FOOTER_HEIGHT
    canvas = Canvas(width, height)
    top = MARGIN + HEADER_HEIGHT
    bottom = top + len(summary) * ROW_HEIGHT
    for row, arm in enumerate(summary):
        canvas.write(MARGIN, top + (row + 0.5) * ROW_HEIGHT, arm, INK, "lm")
    for panel, ability in enumerate(ABILITY_NAMES):
        left = MARGIN + LABEL_WIDTH + panel * (PANEL_WIDTH + PANEL_GAP)
        canvas.write(left, MARGIN, ability, INK, "lt", TITLE_SIZE)
        for percent in (0, 25, 50, 75, 100):
            x = left + PANEL_WIDTH * percent / 100
            canvas.line((x, top), (x, bottom), GRID, 1)
            canvas.write(x, bottom + 8, f"{percent}", PALE_INK, "mt")
        for row, measured in enumerate(summary.values()):
            y = top + (row + 0.5) * ROW_HEIGHT
            if ability not in measured:
                canvas.write(left + PANEL_WIDTH / 2, y, "not asked", PALE_INK, "mm")
                continue
            spread = measured[ability]
            places = [left + PANEL_WIDTH * value for value in spread.values]
            mean = left + PANEL_WIDTH * spread.mean
            canvas.line((min(places), y), (max(places), y), MARK, 2)
            for x in places:
                canvas.dot(x, y, DOT_RADIUS, DOT)
            canvas.line((mean, y - MEAN_HEIGHT / 2), (mean, y + MEAN_HEIGHT / 2), MARK, 2)
    canvas.write(
        MARGIN, height - MARGIN, "Right answers in %. A dot is a seed, the upright bar their mean.", PALE_INK, "lb"
    )
    return canvas.finish()


class Canvas:
    """What is drawn on, in pixels of the finished picture.

    Args:
        width, height: of it.
    """

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.image = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), "white")
        self.draw = ImageDraw.Draw(self.image)

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: str, thickness: int) -> None:
        """A straight line."""
        ends = [coordinate * OVERSAMPLING for coordinate in (*start, *end)]
        self.draw.line(ends, fill=colour, width=thickness * OVERSAMPLING)

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """A full circle."""
        self.draw.circle((x * OVERSAMPLING, y * OVERSAMPLING), radius * OVERSAMPLING, fill=colour)

    def write(self, x: float, y: float, text: str, colour: str, anchor: str, size: int = FONT_SIZE) -> None:
        """A line of text; `anchor` as PIL names it."""
        font = ImageFont.load_default(size * OVERSAMPLING)
        self.draw.text((x * OVERSAMPLING, y * OVERSAMPLING), text, fill=colour, font=font, anchor=anchor)

    def finish(self) -> Image.Image:
        """The picture at its size."""
        return self.image.resize(self.size, Image.Resampling.LANCZOS)
