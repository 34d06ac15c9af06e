"""A sheet of what a model was given, what it answered and what is right: documents beside each other, as one picture."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

INK, FAINT, GROUND, LINE = (32, 32, 36), (116, 116, 122), (255, 255, 255), (222, 222, 226)
GREEN, RED = (24, 128, 62), (190, 40, 36)
TITLE_SIZE, TEXT_SIZE = 16, 14
MARGIN, GAP, LINE_HEIGHT = 16, 6, 19
IMAGE_SIZE, FRAME_SIZE = 96, 64  # of a picture, and of a video's, in pixels of the sheet
MAX_LINES = 5  # of one text
# Heading and width of each column.
COLUMNS = (("", 176), ("given", 556), ("the model", 316), ("right", 206))


@dataclass(frozen=True)
class Row:
    """A row of the sheet.

    Args:
        title: what was asked for.
        verdict: in words.
        is_right: None if nobody can say.
        given, answered, right: documents, images PIL and videos lists of frames.
    """

    title: str
    verdict: str
    is_right: bool | None
    given: list[dict[str, Any]]
    answered: list[dict[str, Any]]
    right: list[dict[str, Any]]


@dataclass(frozen=True)
class Tile:
    """A picture or the lines of a text, and where its left upper corner is in its column."""

    content: "Image | list[str]"
    left: int
    top: int


def wrap(text: str, font: "FreeTypeFont | ImageFont", width: int) -> list[str]:
    """The lines of a text in a column, at most `MAX_LINES`; words that are too wide are broken."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1][:-3]}..."]
    return lines


def arrange(document: list[dict[str, Any]], font: "FreeTypeFont | ImageFont", width: int) -> tuple[list[Tile], int]:
    """Put the parts of a document beside each other, and below where there is no room; a text after a text below it.

    Returns:
        The tiles, and their height altogether.
    """
    tiles: list[Tile] = []
    top = right = bottom = 0  # of the line so far
    left, text_bottom = 0, None  # of the tile before; it is no text where it has no bottom
    for part in document:
        contents: list[tuple[Any, int, int]]  # with width and height
        if part["type"] == "text":
            lines = wrap(part["text"], font, width)
            contents = [(lines, math.floor(max(map(font.getlength, lines))), LINE_HEIGHT * len(lines))]
        else:
            size = IMAGE_SIZE if part["type"] == "image" else FRAME_SIZE
            pictures = [part["image"]] if part["type"] == "image" else part["video"]
            contents = [(enlarge(picture, size), size, size) for picture in pictures]
        for content, tile_width, height in contents:
            is_text = isinstance(content, list)
            if is_text and text_bottom is not None and left + tile_width <= width:
                tile = Tile(content, left, text_bottom + GAP)
            elif right + tile_width <= width:
                tile = Tile(content, right, top)
            else:
                top, right = bottom + GAP, 0
                tile = Tile(content, 0, top)
            tiles.append(tile)
            left, right = tile.left, max(right, tile.left + tile_width + GAP)
            bottom = max(bottom, tile.top + height)
            text_bottom = tile.top + height if is_text else None
    return tiles, bottom


def enlarge(picture: "Image", size: int) -> "Image":
    """A picture as a square of so many pixels, each of its own to be seen."""
    from PIL.Image import Resampling

    return picture.convert("RGB").resize((size, size), Resampling.NEAREST)


def make_sheet(title: str, rows: list[Row]) -> "Image":
    """Draw a sheet with a heading and one row per ability."""
    from PIL import Image, ImageDraw, ImageFont

    title_font, font = (ImageFont.load_default(size) for size in (TITLE_SIZE, TEXT_SIZE))
    titles = [wrap(row.title, title_font, COLUMNS[0][1]) for row in rows]
    arranged = [
        [
            arrange(document, font, width)
            for document, (_, width) in zip((row.given, row.answered, row.right), COLUMNS[1:], strict=True)
        ]
        for row in rows
    ]
    verdicts = [wrap(row.verdict, font, COLUMNS[0][1]) for row in rows]
    heights = [
        max(LINE_HEIGHT * (len(name) + len(verdict)), *(height for _, height in columns)) + 2 * GAP
        for name, verdict, columns in zip(titles, verdicts, arranged, strict=True)
    ]
    lefts = [MARGIN + sum(width + MARGIN for _, width in COLUMNS[:index]) for index in range(len(COLUMNS) + 1)]
    top = 2 * MARGIN + 2 * LINE_HEIGHT
    sheet = Image.new("RGB", (lefts[-1], top + sum(heights) + MARGIN), GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    for left, (heading, _) in zip(lefts, COLUMNS, strict=False):
        draw.text((left, MARGIN + LINE_HEIGHT + GAP), heading, FAINT, font)
    for row, name, verdict, columns, height in zip(rows, titles, verdicts, arranged, heights, strict=True):
        draw.line((MARGIN, top, lefts[-1] - MARGIN, top), LINE)
        top += GAP
        write_lines(draw, name, (lefts[0], top), INK, title_font)
        colour = {True: GREEN, False: RED, None: FAINT}[row.is_right]
        write_lines(draw, verdict, (lefts[0], top + LINE_HEIGHT * len(name)), colour, font)
        for left, (tiles, _) in zip(lefts[1:], columns, strict=False):
            for tile in tiles:
                place = (left + tile.left, top + tile.top)
                if isinstance(tile.content, list):
                    write_lines(draw, tile.content, place, INK, font)
                else:
                    sheet.paste(tile.content, place)
                    right_bottom = (place[0] + tile.content.width - 1, place[1] + tile.content.height - 1)
                    draw.rectangle((place, right_bottom), outline=LINE)
        top += height - GAP
    return sheet


def write_lines(draw: Any, lines: list[str], place: tuple[int, int], colour: tuple[int, int, int], font: Any) -> None:
    """Write lines below each other."""
    for index, line in enumerate(lines):
        draw.text((place[0], place[1] + index * LINE_HEIGHT), line, colour, font)
