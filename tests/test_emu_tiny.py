"""The small model that comes along: it is whole and small, and does what its card says."""

import math
import re
from pathlib import Path

import pytest

from modeling_emu import EmuConfig
from modeling_emu.cli.loading import EMU_TINY, TINY, load_pipeline
from modeling_emu.evaluation import Report, evaluate_shapes
from modeling_emu.evaluation.shapes import ABILITIES
from modeling_emu.hub.repository import list_code_files


NUM_SAMPLES = 24
SEED = 20_000  # other scenes than those of the card
STANDARD_ERRORS = 4
NAMES = [ability.name for ability in ABILITIES]


def read_shares(card: Path) -> dict[str, float]:
    """By ability, the share of right answers in a card's table."""
    rows = re.findall(r"^\| ([^|]+) \| (\d+) / (\d+) \|", card.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(num_right) / int(num_samples) for name, num_right, num_samples in rows}


@pytest.fixture(scope="module")
def report() -> Report:
    pipeline = load_pipeline(EMU_TINY)
    pipeline.set_progress_bar_config(disable=True)
    return evaluate_shapes(pipeline, NUM_SAMPLES, SEED)


def test_it_is_small_and_without_code():
    assert EmuConfig.from_pretrained(EMU_TINY).variant == TINY
    files = [file for file in EMU_TINY.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    assert not [file for file in files if file.suffix in (".py", ".bin", ".pt")]
    assert not {file.name for file in list_code_files()} & {file.name for file in files}


def test_the_card_has_every_ability():
    assert list(read_shares(EMU_TINY / "README.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_does_what_its_card_says(report, name):
    """On fresh scenes, and not far below: four standard errors of so few samples."""
    share = read_shares(EMU_TINY / "README.md")[name]
    figure = report.get(name)
    margin = STANDARD_ERRORS * math.sqrt(max(share * (1 - share), 0.01) / figure.num_samples)
    assert figure.share >= share - margin, f"{figure.num_right} / {figure.num_samples}, in the card {share:.1%}"
