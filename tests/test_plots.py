"""Pictures of runs are real PNG files that differ with what they show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from ubn_zoo.plots import draw_training
from ubn_zoo.train import EpochMetrics, read_metrics

pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, of the extra ubn-zoo[quickstart]")

TABLE = Path(__file__).parents[1] / "results" / "cifar10_small.csv"


@pytest.fixture
def rows() -> tuple[EpochMetrics, ...]:
    return read_metrics(TABLE)


def picture(rows: list[EpochMetrics], path: Path) -> tuple[tuple[int, int], bytes]:
    draw_training(rows, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size, image.convert("RGB").tobytes()


def test_gated_runs_get_a_second_panel(rows: tuple[EpochMetrics, ...], tmp_path: Path) -> None:
    (both, _), (bn, _) = (
        picture([row for row in rows if row.norm in norms], tmp_path / f"{len(norms)}.png")
        for norms in (("ubn", "bn"), ("bn",))
    )
    assert both[0] == 2 * bn[0]
    assert both[1] == bn[1]


def test_the_picture_shows_the_accuracy(rows: tuple[EpochMetrics, ...], tmp_path: Path) -> None:
    same = picture(list(rows), tmp_path / "a.png")
    assert picture(list(rows), tmp_path / "b.png") == same
    changed = [dataclasses.replace(rows[0], top1=rows[0].top1 + 5), *rows[1:]]
    assert picture(changed, tmp_path / "c.png") != same


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one epoch"):
        draw_training([], tmp_path / "d.png")
