"""Benchmarks time what they say, take turns, and write tables that timm's tools can read."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ubn_zoo import benchmark

REPOSITORY = Path(__file__).parents[1]

# What timm's benchmark.py writes with `--bench both`, in its order.
TIMMS_COLUMNS = [
    "model",
    *(f"infer_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size")),
    *(f"train_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size")),
    "param_count",
]


@pytest.fixture(scope="module")
def timings() -> list[benchmark.Timing]:
    return list(
        benchmark.compare(
            ["mobilenetv3_small_050", "mobilenetv3_small_050_ubn"],
            modes=benchmark.MODES,
            batch_size=2,
            img_size=32,
            steps=3,
        )
    )


def entry(timings: list[benchmark.Timing], mode: str, model: str) -> benchmark.Timing:
    (found,) = [timing for timing in timings if (timing.mode, timing.model) == (mode, model)]
    return found


def test_every_mode_and_model(timings: list[benchmark.Timing]) -> None:
    plain = ["mobilenetv3_small_050", "mobilenetv3_small_050_ubn"]
    fused = [plain[0], *(f"{name} (fused)" for name in plain)]
    assert [(timing.mode, timing.model) for timing in timings] == [
        *(("train", name) for name in plain),
        *(("eval", name) for name in plain),
        *(("fused", name) for name in fused),
        *(("folded", name) for name in fused),
    ]
    for timing in timings:
        assert 0 < timing.minimum <= timing.lower <= timing.median <= timing.upper <= timing.maximum
        assert (timing.batch_size, timing.img_size) == (2, 32)
        assert timing.ratio > 0
        # torch counts memory on GPUs only.
        assert timing.memory is None
    assert all(timing.ratio == 1 for timing in timings if timing.model == plain[0])


def test_what_is_fused(timings: list[benchmark.Timing]) -> None:
    """Trained layers leave something behind; of converted ones no more is left than of BatchNorm."""
    twin, base = "mobilenetv3_small_050_ubn (fused)", "mobilenetv3_small_050 (fused)"
    count = {mode: entry(timings, mode, twin).param_count for mode in ("fused", "folded")}
    assert count["folded"] == entry(timings, "folded", base).param_count
    assert count["fused"] > count["folded"]


def test_table_has_timms_columns(timings: list[benchmark.Timing], tmp_path: Path) -> None:
    rows = benchmark.table(timings, environment="here")
    file = tmp_path / "table.csv"
    benchmark.write_table(rows, file)
    with file.open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [name for name in read[0] if name in TIMMS_COLUMNS] == TIMMS_COLUMNS
    # The baseline and its twin, then the baseline beside the fused models twice.
    assert [(row["model"], row["fused"]) for row in read[:2]] == [
        ("mobilenetv3_small_050", ""),
        ("mobilenetv3_small_050_ubn", ""),
    ]
    assert len(read) == 2 + 3 + 3
    twin = read[1]
    trained, evaluated = (entry(timings, mode, "mobilenetv3_small_050_ubn") for mode in ("train", "eval"))
    for prefix, timing in (("train", trained), ("infer", evaluated)):
        assert float(twin[f"{prefix}_step_time"]) == pytest.approx(timing.median, abs=1e-3)
        assert float(twin[f"{prefix}_samples_per_sec"]) == pytest.approx(2000 / timing.median, rel=1e-2)
        assert float(twin[f"{prefix}_ratio"]) == pytest.approx(timing.ratio, abs=1e-3)
        assert (twin[f"{prefix}_batch_size"], twin[f"{prefix}_img_size"]) == ("2", "32")
        assert twin[f"{prefix}_memory"] == ""
    assert float(twin["param_count"]) == pytest.approx(trained.param_count / 1e6, abs=0.01)
    assert all(row["environment"] == "here" for row in read)
    assert read[-1]["train_step_time"] == ""


def test_layers() -> None:
    timings = list(benchmark.compare_layers([(8, 6), (4, 3)], batch_size=2, steps=2))
    names = ["BatchNorm2d", "UBN", "RBN", "BNET", "UBN naive"]
    assert [timing.model for timing in timings] == [f"{name} {shape}" for shape in ("8x6x6", "4x3x3") for name in names]
    # K and bias; w, u and v beside them.
    assert [timing.param_count for timing in timings[:5]] == [16, 8 * 13, 8 * 5, 8 * 10, 8 * 13]
    assert {timing.mode for timing in timings} == {"layer"}
    (first, *_) = benchmark.table(timings)
    assert first["infer_step_time"] is None
    assert first["train_img_size"] == 6


def test_turns_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """All entries once per turn, the first turns not counted."""
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return self.fc(x.mean((2, 3)))

    monkeypatch.setattr(benchmark.timm, "create_model", Noted)
    monkeypatch.setattr(benchmark.timm.models, "get_pretrained_cfg_value", lambda *_: 2)
    assert len(list(benchmark.compare(["a", "b"], modes=["eval"], batch_size=1, img_size=8, steps=2))) == 2
    assert order == ["a", "b"] * 4


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modes \['test'\]; valid are .*train, eval, fused, folded"):
        list(benchmark.compare(["resnet18"], modes=["test"]))
    with pytest.raises(ValueError, match=r"models \[\]"):
        list(benchmark.compare([]))
    for run in (benchmark.compare(["resnet18"], steps=0), benchmark.compare_layers(steps=0)):
        with pytest.raises(ValueError, match="steps is 0"):
            list(run)
    with pytest.raises(ValueError, match="no rows"):
        benchmark.write_table([], tmp_path / "table.csv")
    with pytest.raises(ValueError, match="no timings"):
        benchmark.draw_ratios([], tmp_path / "ratios.png")


def test_picture(timings: list[benchmark.Timing], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, of the extra ubn-zoo[quickstart]")
    from PIL import Image

    sizes = []
    for name, chosen in (("all", timings), ("train", timings[:2])):
        benchmark.draw_ratios(chosen, tmp_path / f"{name}.png", "somewhere")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"
            sizes.append(image.size)
    assert sizes[0][0] == 4 * sizes[1][0]


def test_script(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "scripts" / "benchmark.py")]
    arguments = ["--models", "mobilenetv3_small_050", "--modes", "eval", "fused", "--img-size", "32", "--steps", "1"]
    files = ["--csv", str(tmp_path / "t.csv")]
    done = subprocess.run(
        [*script, *arguments, *files], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert "mobilenetv3_small_050_ubn (fused)" in done.stdout
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 2 + 3
