"""Benchmarks: what they time, alternation, and tables in timm's format for the speed page."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from research import benchmark
from research.benchmark import GrowthPoint, Share, Timing
from research.benchmark.targets import TARGETS

REPOSITORY = Path(__file__).parents[2]
MODEL = "mobilenetv3_small_050"
ABOUT = {"date": "2026-01-01", "command": "python -m research.benchmark", "environment": "here"}

# What timm's benchmark.py writes with `--bench both`, in its order.
TIMMS_COLUMNS = [
    "model",
    *(f"infer_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size")),
    *(f"train_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size")),
    "param_count",
]


@pytest.fixture(scope="module")
def timings() -> list[Timing]:
    return list(benchmark.compare(MODEL, modes=benchmark.MODES, batch_size=2, img_size=32, steps=3))


KINDS = ["bn", "ubn", "rbn", "bnet", "naive"]


@pytest.fixture(scope="module")
def layers() -> list[Timing]:
    shapes = [(8, 6), (4, 3)]
    return list(benchmark.compare_layers(shapes, kinds=KINDS, modes=benchmark.LAYER_MODES, batch_size=2, steps=2))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """What is compiled; it stays what it is, as compiling takes long."""
    found: list[nn.Module] = []

    def compile(module: nn.Module, **_: object) -> nn.Module:
        found.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    yield found


def entry(timings: list[Timing], mode: str, model: str) -> Timing:
    (found,) = [timing for timing in timings if (timing.mode, timing.model) == (mode, model)]
    return found


def test_every_mode_and_model(timings: list[Timing]) -> None:
    plain, twin = MODEL, f"{MODEL}_ubn"
    fused = [f"{plain} (fused)", plain, f"{twin} (fused)"]
    assert [(timing.mode, timing.model) for timing in timings] == [
        *(("train", name) for name in (plain, twin)),
        *(("eval", name) for name in (plain, twin)),
        *(("fused", name) for name in fused),
        *(("folded", name) for name in fused),
    ]
    for timing in timings:
        assert 0 < timing.minimum <= timing.lower <= timing.median <= timing.upper <= timing.maximum
        assert timing.ratio_lower is not None and timing.ratio_upper is not None
        assert 0 < timing.ratio_lower <= timing.ratio <= timing.ratio_upper
        assert (timing.batch_size, timing.img_size) == (2, 32)
        assert (timing.device, timing.dtype, timing.channels_last) == ("cpu", "float32", True)
        assert timing.kind == ("ubn" if "_ubn" in timing.model else "bn")
        assert timing.floor_ratio is None
    assert [timing.ratio for timing in timings if timing.model == plain][:2] == [1, 1]
    assert all(timing.ratio == 1 for timing in timings if timing.model == fused[0])


def test_what_is_fused(timings: list[Timing]) -> None:
    """Trained layers have a remainder; converted ones fold as completely as BatchNorm."""
    twin, base = f"{MODEL}_ubn (fused)", f"{MODEL} (fused)"
    count = {mode: entry(timings, mode, twin).param_count for mode in ("fused", "folded")}
    assert count["folded"] == entry(timings, "folded", base).param_count
    assert count["fused"] > count["folded"]


def test_floors_of_models(timings: list[Timing]) -> None:
    """In training both norms have the same traffic; folded layers have none."""
    twin = f"{MODEL}_ubn"
    base, ubn = entry(timings, "train", MODEL), entry(timings, "train", twin)
    assert base.floor == ubn.floor
    assert ubn.floor is not None and ubn.floor > 0
    assert base.convolution is None and base.limit is None
    assert ubn.convolution is not None and ubn.limit is not None
    assert entry(timings, "fused", f"{MODEL} (fused)").floor == 0
    assert entry(timings, "folded", f"{twin} (fused)").floor == 0
    fused, evaluated = entry(timings, "fused", f"{twin} (fused)"), entry(timings, "eval", twin)
    assert fused.floor is not None and evaluated.floor is not None
    assert fused.floor > 0
    assert fused.limit is not None and fused.limit > 1


def test_memory_of_models(timings: list[Timing]) -> None:
    for timing in timings:
        assert timing.memory is not None and timing.memory_ratio is not None
        assert timing.memory * 2**20 >= 4 * timing.param_count
    # Training holds gradients and features beside what inference holds.
    trained, evaluated = (entry(timings, mode, MODEL).memory for mode in ("train", "eval"))
    assert trained is not None and evaluated is not None
    assert trained > 1.5 * evaluated
    assert entry(timings, "train", MODEL).memory_ratio == 1


def test_settings_are_separate_models(compiled: list[nn.Module]) -> None:
    """Compiled and uncompiled entries alternate; the naive twin is not compiled, because its graph would be UBN's."""
    found = benchmark.compare(
        MODEL, ["ubn", "rbn", "bnet", "naive"], modes=["train"], batch_size=2, img_size=32, steps=1, compiled=True
    )
    timings = {timing.model: timing for timing in found}
    names = [MODEL, *(f"{MODEL}_{kind}" for kind in ("ubn", "rbn", "bnet"))]
    expected = [name + suffix for name in names for suffix in ("", " (compiled)")]
    assert list(timings) == [*expected, f"{MODEL}_naive"]
    assert len(compiled) == 4
    count = {timing.kind: timing.param_count for timing in timings.values()}
    assert count["bn"] < count["rbn"] < count["bnet"] < count["ubn"] == count["naive"]
    assert timings[f"{MODEL}_rbn"].convolution is None
    # Autograd saves features for every operation.
    memory = {kind: timings[f"{MODEL}_{kind}"].memory for kind in ("ubn", "naive")}
    assert memory["ubn"] is not None and memory["naive"] is not None
    assert memory["naive"] > memory["ubn"]


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast(amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions compute in half precision; in float16 the loss is scaled."""
    seen: set[torch.dtype] = set()
    scaled: list[bool] = []
    original = torch.amp.GradScaler.scale

    def noting(self: Any, loss: Any) -> Any:
        scaled.append(self.is_enabled())
        return original(self, loss)

    class Noting(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.add(input.dtype)
            return super().forward(input)

    def create(*_: object, **__: object) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), Noting(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))

    monkeypatch.setattr(torch.amp.GradScaler, "scale", noting)
    monkeypatch.setattr("timm.create_model", create)
    found = list(benchmark.compare("resnet18", [], modes=["train", "eval"], batch_size=2, img_size=8, steps=1, amp=amp))
    assert [timing.dtype for timing in found] == [f"amp {amp}"] * 2
    assert seen == {getattr(torch, amp)}
    assert set(scaled) == {amp == "float16"}


def test_entries_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry runs once per turn, without timing in the first turns, then once for memory."""
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str, **_: object) -> None:
            super().__init__()
            self.name = name
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return self.fc(x.mean((2, 3)))

    monkeypatch.setattr("timm.create_model", Noted)
    found = benchmark.compare("resnet18", modes=["eval"], batch_size=1, img_size=8, steps=2, floors=False)
    assert [timing.floor for timing in found] == [None, None]
    assert order == ["resnet18", "resnet18_ubn"] * 5


def test_layers(layers: list[Timing]) -> None:
    names = [benchmark.KINDS[kind] for kind in KINDS] + ["depthwise convolution", "copy"]
    shapes = [f"{name} {shape}" for shape in ("8x6x6", "4x3x3") for name in names]
    assert [(timing.mode, timing.model) for timing in layers] == [
        (mode, shape) for mode in ("layer", "layer-eval") for shape in shapes
    ]
    # K and bias; w, u and v beside them.
    counts = {timing.kind: timing.param_count for timing in layers[: len(KINDS)]}
    assert counts == {"bn": 16, "ubn": 8 * 13, "rbn": 8 * 5, "bnet": 8 * 10, "naive": 8 * 13}


def test_floors_of_layers(layers: list[Timing]) -> None:
    *norms, convolution, copy = layers[: len(KINDS) + 2]
    base, ubn, rbn, bnet, naive = norms
    for timing in norms:
        # BatchNorm's 8 passes over its input; a copy makes 2.
        assert timing.floor == pytest.approx(4 * copy.median)
        assert timing.floor_ratio == pytest.approx(timing.median / (4 * copy.median))
    for timing in (ubn, bnet, naive):
        assert timing.convolution == convolution.median
        assert timing.limit == pytest.approx(1 + convolution.median / base.median)
    assert base.convolution is None and rbn.convolution is None
    evaluation = [timing for timing in layers if timing.mode == "layer-eval"]
    found = {timing.kind: timing.floor for timing in evaluation[: len(KINDS)]}
    copy = evaluation[len(KINDS) + 1]
    expected = {"bn": 1, "ubn": 1.5, "rbn": 1.5, "bnet": 1, "naive": 1.5}
    assert found == {kind: pytest.approx(factor * copy.median) for kind, factor in expected.items()}


def test_layers_in_half_precision_and_compiled(compiled: list[nn.Module]) -> None:
    shape, settings = [(4, 3)], {"kinds": ["bn", "ubn"], "batch_size": 2, "steps": 1}
    found = benchmark.compare_layers(shape, **settings, dtype=torch.bfloat16, channels_last=False, compiled=True)
    timings = list(found)
    assert [timing.model for timing in timings[:4]] == [
        f"{name} 4x3x3{suffix}" for name in ("BatchNorm2d", "UBN") for suffix in ("", " (compiled)")
    ]
    assert {(timing.dtype, timing.channels_last) for timing in timings} == {("bfloat16", False)}
    assert len(compiled) == 2


def test_memory_of_a_layer_counted_by_hand() -> None:
    """Inference needs BatchNorm2d's input and output; training also their gradients and backward's temporaries."""
    modes = ("layer", "layer-eval")
    trained, _, _, evaluated, _, _ = benchmark.compare_layers([(16, 32)], modes=modes, kinds=["bn"], steps=1)
    features = 4 * 8 * 16 * 32 * 32
    assert trained.memory is not None and evaluated.memory is not None
    assert evaluated.memory * 2**20 == pytest.approx(2 * features, rel=0.01)
    assert 4 * features <= trained.memory * 2**20 <= 5.1 * features


def test_peak_memory() -> None:
    """Memory freed during the step does not count toward the peak."""

    def step() -> None:
        for _ in range(3):
            values = torch.ones(1000)
            values = values + 1
            del values

    assert benchmark.peak_memory(step, torch.device("cpu")) == pytest.approx(8000, abs=256)


def test_fit_finds_the_line_that_points_lie_on() -> None:
    points = [point("batch", batch_size=size, median=0.5 + 2e-6 * size * 8 * 16) for size in (1, 2, 4, 8, 16)]
    points += [point("ranks", ranks=ranks, median=3.0 * ranks) for ranks in (1, 2, 4)]
    batch, ranks = benchmark.fit(points)
    assert (batch.axis, batch.layer) == ("batch", "UBN")
    assert batch.fixed == pytest.approx(0.5)
    assert batch.slope == pytest.approx(2)  # nanoseconds per element
    assert batch.r_squared == pytest.approx(1)
    assert 0 < batch.exponent < 0.1
    assert batch.time(10**6) == pytest.approx(2.5)
    assert (ranks.slope, ranks.exponent) == (pytest.approx(3), pytest.approx(1))
    assert ranks.time(8) == pytest.approx(24)
    assert benchmark.fit(points[:1]) == []


def point(axis: str, *, median: float, batch_size: int = 2, ranks: int = 1, layer: str = "UBN") -> GrowthPoint:
    return GrowthPoint(
        axis=axis,
        layer=layer,
        batch_size=batch_size,
        channels=8,
        side=4,
        ranks=ranks,
        median=median,
        lower=median / 2,
        upper=2 * median,
    )


BASE = {"batch": 2, "pixels": 4, "channels": 8}


def test_one_size_varies_at_a_time() -> None:
    points = list(benchmark.grow({"pixels": (2, 8), "channels": (4,)}, base=BASE, steps=1))
    sizes = [(point.axis, point.batch_size, point.channels, point.side) for point in points if point.layer == "UBN"]
    assert sizes == [("pixels", 2, 8, 2), ("pixels", 2, 8, 8), ("channels", 2, 4, 4)]
    assert [point.layer for point in points[: len(benchmark.KINDS)]] == list(benchmark.KINDS.values())
    assert all(point.median > 0 and point.floor is not None and point.floor > 0 for point in points)
    assert points[0].elements == 2 * 8 * 2 * 2
    with pytest.raises(ValueError, match=r"axes: received \['width'\]; valid: batch, pixels, channels"):
        list(benchmark.grow({"width": (1,)}))


def test_only_synchronized_ranks_share() -> None:
    """Only the synchronized layer shares: a row of statistics of each rank, again in backward, and a unit vector."""
    points = {point.layer: point for point in benchmark.grow_ranks((2,), base=BASE, steps=1)}
    assert list(points) == ["UBN", "UBN naive", "UBN synchronized"]
    assert {point.ranks for point in points.values()} == {2}
    for layer in ("UBN", "UBN naive"):
        assert (points[layer].collectives, points[layer].collective_bytes) == (0, 0)
    statistics, similarity = 4 * 2 * (2 * 8 + 2), 4 * (8 * 4 * 4 + 1)
    synchronized = points["UBN synchronized"]
    assert (synchronized.collectives, synchronized.collective_bytes) == (3, 2 * statistics + similarity)
    with pytest.raises(ValueError, match=r"counts: received \[0\]; valid: one rank"):
        list(benchmark.grow_ranks((0,)))


def test_profile_knows_a_norms_operations() -> None:
    found: dict[str, dict[str, Share]] = {}
    for share in benchmark.profile_step(MODEL, batch_size=2, img_size=32, steps=1):
        found.setdefault(share.model, {})[share.group] = share
    base, twin = found[MODEL], found[f"{MODEL}_ubn"]
    assert base["batchnorm"].time > 0
    # MobileNet's own depthwise convolutions are not the norm's.
    assert set(base) == {"convolution", "batchnorm", "small", "other"}
    assert set(twin) == set(benchmark.GROUPS) - {"batchnorm"}
    for shares in found.values():
        assert sum(share.share for share in shares.values()) == pytest.approx(1)


def test_table_has_timms_columns(timings: list[Timing], tmp_path: Path) -> None:
    rows = benchmark.table(timings, **ABOUT)
    file = tmp_path / "table.csv"
    benchmark.write_table(rows, file)
    with file.open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [name for name in read[0] if name in TIMMS_COLUMNS] == TIMMS_COLUMNS
    # The baseline and its twin, then both fused and the baseline beside them, twice.
    assert [(row["model"], row["fused"]) for row in read[:2]] == [(MODEL, ""), (f"{MODEL}_ubn", "")]
    assert len(read) == 2 + 3 + 3
    twin = read[1]
    trained, evaluated = (entry(timings, mode, f"{MODEL}_ubn") for mode in ("train", "eval"))
    for prefix, timing in (("train", trained), ("infer", evaluated)):
        assert float(twin[f"{prefix}_step_time"]) == pytest.approx(timing.median, abs=1e-3)
        assert float(twin[f"{prefix}_samples_per_sec"]) == pytest.approx(2000 / timing.median, rel=1e-2)
        assert float(twin[f"{prefix}_ratio"]) == pytest.approx(timing.ratio, abs=1e-3)
        assert (twin[f"{prefix}_batch_size"], twin[f"{prefix}_img_size"]) == ("2", "32")
        assert float(twin[f"{prefix}_memory"]) == pytest.approx(timing.memory, abs=1e-3)
    assert float(twin["param_count"]) == pytest.approx(trained.param_count / 1e6, abs=0.01)
    assert all(row["environment"] == "here" for row in read)
    assert read[-1]["train_step_time"] == ""


def test_tables_are_read_as_written(timings: list[Timing], layers: list[Timing], tmp_path: Path) -> None:
    for written in (timings, layers):
        benchmark.write_table(benchmark.table(written, **ABOUT), tmp_path / "t.csv")
        read, about = benchmark.read_timings(tmp_path / "t.csv")
        assert about == ABOUT
        found = {(timing.mode, timing.model): timing for timing in read}
        assert len(found) == len(written)
        for timing in written:
            other = dataclasses.asdict(found[timing.mode, timing.model])
            for name, value in dataclasses.asdict(timing).items():
                # Parameters are counted in hundredths of a million.
                tolerance = 5001 if name == "param_count" else 6e-4
                assert other[name] == (
                    pytest.approx(value, abs=tolerance) if isinstance(value, (int, float)) else value
                )
    points = [point("batch", median=1.5), dataclasses.replace(point("ranks", ranks=2, median=2.5), floor=0.5)]
    benchmark.write_table(benchmark.rows_of(points, **ABOUT), tmp_path / "p.csv")
    assert benchmark.read_growth(tmp_path / "p.csv") == (points, ABOUT)
    shares = [Share("resnet50", "other", 2.5, 0.25)]
    benchmark.write_table(benchmark.rows_of(shares, **ABOUT), tmp_path / "s.csv")
    assert benchmark.read_profile(tmp_path / "s.csv") == (shares, ABOUT)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modes: received \['test'\]; valid: train, eval, fused, folded"):
        list(benchmark.compare("resnet18", modes=["test"]))
    with pytest.raises(ValueError, match=r"settings: received \['bn'\]; valid: ubn, .*naive"):
        list(benchmark.compare("resnet18", ["bn"]))
    with pytest.raises(ValueError, match=r"amp: received 'float8'; valid: bfloat16, float16, or None"):
        list(benchmark.compare("resnet18", amp="float8"))
    with pytest.raises(ValueError, match=r"modes: received \['train'\]; valid: layer, layer-eval"):
        list(benchmark.compare_layers(modes=["train"]))
    with pytest.raises(ValueError, match=r"kinds: received \[\]; valid: bn, ubn, .*one at least"):
        list(benchmark.compare_layers(kinds=[]))
    runs = benchmark.compare("resnet18", steps=0), benchmark.compare_layers(steps=0), benchmark.grow_ranks(steps=0)
    for run in runs:
        with pytest.raises(ValueError, match="steps: received 0; valid: 1 and more"):
            list(run)
    with pytest.raises(ValueError, match="rows: received none"):
        benchmark.write_table([], tmp_path / "table.csv")
    with pytest.raises(ValueError, match="timings: received none"):
        benchmark.draw_ratios([], tmp_path / "ratios.png")
    with pytest.raises(ValueError, match="points: received none"):
        benchmark.draw_growth([], tmp_path / "growth.png")
    (tmp_path / "t.csv").write_text("model,run\nresnet18,model\n")
    with pytest.raises(ValueError, match=r"received no command, date, environment; valid: a table of"):
        benchmark.read_timings(tmp_path / "t.csv")


def test_pictures(timings: list[Timing], layers: list[Timing], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, of the extra ubn-zoo[quickstart]")
    from PIL import Image

    sizes = []
    for name, chosen in (("all", [*timings, *layers]), ("train", timings[:2])):
        benchmark.draw_ratios(chosen, tmp_path / f"{name}.png", "somewhere")
        sizes.append(size_of(tmp_path / f"{name}.png"))
    # Six panels in two columns, and one.
    assert sizes[0][0] == 2 * sizes[1][0]
    assert sizes[0][1] > 2 * sizes[1][1]
    points = [point("batch", batch_size=size, median=size) for size in (1, 2)]
    benchmark.draw_growth(points, tmp_path / "growth.png", "somewhere")
    with Image.open(tmp_path / "growth.png") as image:
        assert image.format == "PNG"


def size_of(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size


def timing(model: str, mode: str, median: float, **changes: Any) -> Timing:
    kind = "ubn" if "_ubn" in model or "UBN" in model else "bn"
    given = {"batch_size": 8, "img_size": 224, "device": "cpu", "dtype": "float32", "channels_last": True, **changes}
    spread = dict.fromkeys(("lower", "upper", "minimum", "maximum"), median)
    ratios = {"ratio": median / 100, "ratio_lower": median / 100 - 0.01, "ratio_upper": median / 100 + 0.01}
    memory = {"memory": 10 * median, "memory_ratio": median / 100}
    return Timing(
        model=model, kind=kind, mode=mode, param_count=1, median=median, **{**spread, **ratios, **memory, **given}
    )


def write(timings: list[Timing], folder: Path, name: str = "benchmark_cpu.csv") -> None:
    benchmark.write_table(benchmark.table(timings, **ABOUT), folder / name)


def row(page: str, start: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_page_says_what_was_not_measured(tmp_path: Path) -> None:
    page = benchmark.page(tmp_path)
    assert page.count("not measured on a GPU") == 5
    assert page.count("| not measured |") == sum(target.device == "cpu" for target in TARGETS)
    assert page.count("\nNot measured.\n") == 4
    assert "No GPU was available" in page


def test_page_marks_met_and_missed_targets(tmp_path: Path) -> None:
    twin = {"floor": 20.0, "convolution": 15.0, "limit": 1.05}
    write([timing("resnet50", "train", 100), timing("resnet50_ubn", "train", 134, **twin)], tmp_path)
    large = [("resnet50", 100), ("resnet50_ubn", 150)]
    slow = [timing(name, "train", median, batch_size=32) for name, median in large]
    write(slow, tmp_path, "benchmark_cpu_batch32.csv")
    page = benchmark.page(tmp_path)
    assert row(page, "CPU: resnet50, training step, batch 8") == [
        "1.35",
        "1.34 (1.33 to 1.35)",
        "yes",
        "100 → 134",
        "34.0",
        "20.0",
        "15.0",
        "1.05",
    ]
    assert row(page, "CPU: resnet50, training step, batch 32")[:3] == ["1.35", "1.50 (1.49 to 1.51)", "**no**"]
    assert "2026-01-01, here: [benchmark_cpu_batch32.csv]" in page
    # CPU ratios use neither times of another run nor of compiled models.
    write([timing("resnet50", "train", 50)], tmp_path, "benchmark_a.csv")
    write(
        [timing("resnet50 (compiled)", "train", 50), timing("resnet50_ubn", "train", 90)], tmp_path, "benchmark_b.csv"
    )
    assert row(benchmark.page(tmp_path), "CPU: resnet50, training step, batch 8")[1] == "1.34 (1.33 to 1.35)"


def test_page_takes_the_best_of_a_gpu(tmp_path: Path) -> None:
    """Each norm uses the best of eager and compiled, and the worst shape."""
    gpu = {"device": "cuda", "dtype": "amp bfloat16", "batch_size": 128}
    models = [("resnet50", 100), ("resnet50 (compiled)", 80), ("resnet50_ubn", 130), ("resnet50_ubn (compiled)", 88)]
    shapes = [("BatchNorm2d 64x56x56", 100), ("UBN 64x56x56", 120), ("BatchNorm2d 8x7x7", 100), ("UBN 8x7x7", 140)]
    layer = {**gpu, "dtype": "bfloat16", "img_size": 56}
    write([timing(name, "train", median, **gpu) for name, median in models], tmp_path, "benchmark_gpu.csv")
    write([timing(name, "layer", median, **layer) for name, median in shapes], tmp_path, "benchmark_gpu_layers.csv")
    page = benchmark.page(tmp_path)
    best = row(page, "GPU: resnet50, training step, bfloat16 autocast, best of eager and compiled")
    assert best[:4] == ["1.12", "1.10", "yes", "80.0 → 88.0"]
    worst = row(page, "GPU: layer, training, bfloat16, batch 128, channels_last, worst of ResNet-50's shapes")
    assert worst[:3] == ["1.25", "1.40 (1.39 to 1.41)", "**no**"]
    memory = row(page, "GPU: resnet50, peak memory of a training step, bfloat16 autocast")
    assert memory[:4] == ["1.05", "1.10", "**no**", "800 → 880 MB"]
    assert "No GPU was available" not in page
    # One kind of hardware needs no heading, two do.
    assert "### GPU" not in page
    assert "speed_models_gpu.png" in page and "speed_layers_gpu.png" in page
    write([timing("resnet50", "train", 100), timing("resnet50_ubn", "train", 134)], tmp_path)
    page = benchmark.page(tmp_path)
    assert page.index("### CPU") < page.index("### GPU")
    assert "speed_models.png" in page and "speed_models_gpu.png" in page


def test_the_page_matches_the_tables() -> None:
    written = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
    assert written == benchmark.page(REPOSITORY / "results"), "regenerate it: python -m research.benchmark --report"
    pictures = re.findall(r"\]\((\w+\.png)\)", written)
    assert pictures
    for picture in pictures:
        assert (REPOSITORY / "docs" / picture).is_file()


def test_report_writes_page_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, of the extra ubn-zoo[quickstart]")
    write([timing("resnet50", "train", 100), timing("resnet50_ubn", "train", 134)], tmp_path)
    points = [point(axis, ranks=size, batch_size=size, median=size) for axis in ("batch", "ranks") for size in (1, 2)]
    benchmark.write_table(benchmark.rows_of(points, **ABOUT), tmp_path / "benchmark_cpu_growth.csv")
    shares = [Share("resnet50", "other", 2.5, 0.25), Share("resnet50_ubn", "depthwise", 7.5, 0.75)]
    benchmark.write_table(benchmark.rows_of(shares, **ABOUT), tmp_path / "benchmark_cpu_profile.csv")
    written = benchmark.report(tmp_path, tmp_path)
    assert [path.name for path in written] == ["speed.md", "speed_models.png", "speed_cpu_growth.png"]
    page = written[0].read_text(encoding="utf-8")
    assert row(page, "norm: depthwise convolution") == ["", "7.50 (75 %)"]
    assert row(page, "batch | UBN")[-2:] == ["1.000", "1.00"]
    for path in written[1:]:
        assert f"({path.name})" in page


def run(*arguments: str) -> str:
    script = [sys.executable, "-m", "research.benchmark", *arguments]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    assert "profiler" not in done.stderr
    return done.stdout


def test_script(tmp_path: Path) -> None:
    small = ["--models", MODEL, "--batch-size", "1", "2", "--img-size", "32", "--steps", "1", "--device", "cpu"]
    printed = run(*small, "--modes", "eval", "fused", "--csv", str(tmp_path / "t.csv"))
    assert f"{MODEL}_ubn (fused)" in printed
    timings, about = benchmark.read_timings(tmp_path / "t.csv")
    assert [timing.batch_size for timing in timings] == [1] * 5 + [2] * 5
    assert about["command"].startswith(f"python -m research.benchmark --models {MODEL} --batch-size 1 2")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert "torch" in about["environment"] and "ubn-zoo" in about["environment"]


@pytest.fixture
def script() -> Any:
    return importlib.import_module("research.benchmark.__main__")


def test_script_grows(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "AXES", {"channels": (4, 8)})
    monkeypatch.setattr(benchmark, "RANKS", (1,))
    arguments = ["--growth", "--steps", "1", "--device", "cpu", "--csv", str(tmp_path / "g.csv")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    script.main()
    assert re.search(r"channels +UBN naive +.*ns per element", capsys.readouterr().out)
    points, _ = benchmark.read_growth(tmp_path / "g.csv")
    assert {(point.axis, point.channels) for point in points} == {("channels", 4), ("channels", 8), ("ranks", 128)}


def test_quick_run_covers_everything(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, of the extra ubn-zoo[quickstart]")
    called: dict[str, dict[str, Any]] = {}

    def stand_in(name: str, measured: list[Any]) -> None:
        def call(*_: object, **settings: Any) -> list[Any]:
            called[name] = settings
            return measured

        monkeypatch.setattr(benchmark, name, call)

    stand_in("compare", [timing("resnet50_ubn", "train", 134)])
    stand_in("compare_layers", [timing("UBN 8x7x7", "layer", 134)])
    stand_in("grow", [point("batch", batch_size=size, median=size) for size in (1, 2)])
    stand_in("grow_ranks", [point("ranks", ranks=size, median=size) for size in (1, 2)])
    stand_in("profile_step", [Share("resnet50", "other", 2.5, 1)])
    files = ["--csv", str(tmp_path / "q.csv"), "--plot", str(tmp_path / "q.png")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--device", "cpu", *files])
    script.main()
    assert set(called) == {"compare", "compare_layers", "grow", "grow_ranks", "profile_step"}
    assert called["compare"]["modes"] == list(benchmark.MODES)
    assert called["compare_layers"]["modes"] == benchmark.LAYER_MODES
    written = {"q.csv", "q_growth.csv", "q_profile.csv", "q.png", "q_growth.png"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_script_profiles(tmp_path: Path) -> None:
    arguments = ["--profile", "--models", MODEL, "--batch-size", "2", "--img-size", "32", "--steps", "1"]
    assert "norm: depthwise convolution" in run(*arguments, "--device", "cpu", "--csv", str(tmp_path / "p.csv"))
    shares, _ = benchmark.read_profile(tmp_path / "p.csv")
    assert {share.model for share in shares} == {MODEL, f"{MODEL}_ubn"}


def test_memory_is_kept() -> None:
    """Runs in a separate process, because the setting is permanent. The next tensor reuses the pages of a freed one."""
    program = """
import resource, torch
from research import benchmark

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = [faults() for _ in range(3)][-1]
if benchmark.keep_memory():
    kept = [faults() for _ in range(3)][-1]
    assert fresh > 1000 > 10 * kept, (fresh, kept)
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=120)
