"""Speed of a pair of models: timed steps, ratios, and the output of the command."""

from __future__ import annotations

import csv
import functools
import itertools
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from ubn_zoo import UnifiedBatchNorm2d, cli
from ubn_zoo.errors import EvaluationError, InvalidArgumentError, UnknownModelError
from ubn_zoo.evaluation import speed

MODEL = "resnet10t"
UBN_MODEL = f"{MODEL}_ubn"


class FakeMachine:
    """Replace steps with known durations, which double in every turn and are 1.5 times as long for the UBN model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, str]] = []
        self.kinds = itertools.cycle(["bn", "ubn"])
        monkeypatch.setattr(speed, "train_step", functools.partial(self.make, "train"))
        monkeypatch.setattr(speed, "eval_step", functools.partial(self.make, "eval"))
        monkeypatch.setattr(speed.benchmark, "timer", lambda: self.now)
        monkeypatch.setattr(speed, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    def make(self, mode: str, model: nn.Module, *inputs: object) -> Callable[[], None]:
        # Fused models have no UBN layers left to distinguish them; the BatchNorm model comes first.
        kind = next(self.kinds)
        model.train(mode == "train")

        def step() -> None:
            self.now += 2.0 ** (len(self.calls) // 2) * (1.5 if kind == "ubn" else 1.0)
            self.calls.append((kind, mode))

        return step


def test_every_mode_times_both_models() -> None:
    rows = speed.compare_speed(UBN_MODEL, batch_size=2, img_size=64, seconds=0.01, channels_last=False)
    expected = [(mode, name) for mode in speed.MODES for name in (MODEL, UBN_MODEL)]
    assert [(row.mode, row.model) for row in rows] == expected
    for row in rows:
        assert row.turns >= 3
        assert row.milliseconds > 0.1
        assert row.images_per_second == pytest.approx(2000 / row.milliseconds)
        assert row.ratio_lower <= row.ratio <= row.ratio_upper
        assert row.ratio == 1 or row.model == UBN_MODEL
        assert (row.batch_size, row.img_size, row.device, row.amp) == (2, 64, "cpu", None)
        assert (row.channels_last, row.peak_memory, row.torch) == (False, None, torch.__version__)
        assert row.threads == torch.get_num_threads()


def test_ratios_are_within_turns_and_the_models_take_turns_going_first(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(monkeypatch)
    bn, ubn, *others = speed.compare_speed(MODEL, batch_size=4, img_size=32, seconds=3e-9)
    # The first two of five turns are warm-up; the median turn is the fourth.
    assert (bn.turns, bn.milliseconds, bn.images_per_second) == (3, 8000.0, 0.5)
    assert (ubn.milliseconds, ubn.ratio, ubn.ratio_lower, ubn.ratio_upper) == (12000.0, 1.5, 1.5, 1.5)
    assert {row.ratio for row in others if row.model == UBN_MODEL} == {1.5}
    turns = [machine.calls[start : start + 2] for start in range(0, len(machine.calls), 2)]
    assert [mode for _, mode in machine.calls] == ["train"] * 10 + ["eval"] * 20
    assert all({kind for kind, _ in turn} == {"bn", "ubn"} for turn in turns)
    assert {turn[0][0] for turn in turns[2:5]} == {"bn", "ubn"}


def test_more_time_gives_more_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(monkeypatch)
    # Each mode gets a third of the time. The first eight turns take 2.5 * (2**8 - 1) s, the first nine 2.5 * (2**9 - 1)
    # s.
    rows = speed.compare_speed(MODEL, batch_size=2, img_size=32, seconds=3 * 2.5 * 2**8)
    assert rows[0].turns == 9 - 2


@pytest.mark.parametrize("name", [MODEL, UBN_MODEL, f"{UBN_MODEL}.cifar10", f"{MODEL}.c3_in1k"])
def test_either_name_of_a_pair_is_accepted(name: str) -> None:
    assert speed.sibling_names(name) == (MODEL, UBN_MODEL)


@pytest.mark.parametrize("name", ["resnet10", "vit_tiny_patch16_224", "_ubn", ""])
def test_models_without_a_ubn_sibling_are_rejected(name: str) -> None:
    with pytest.raises(UnknownModelError, match="no UBN model for"):
        speed.compare_speed(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("img_size", -32), ("seconds", 0.0), ("seconds", math.nan), ("seconds", math.inf)],
)
def test_numbers_that_are_not_positive_are_rejected(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{name}`: received .*; valid: a positive number"):
        speed.compare_speed(MODEL, **{name: value})


def test_unsupported_batches_raise_an_evaluation_error() -> None:
    # With one image of 32 pixels, BatchNorm in training is left with one value per channel.
    with pytest.raises(EvaluationError, match=r"cannot compute images of shape \(1, 3, 32, 32\) on cpu: .*per channel"):
        speed.compare_speed(MODEL, batch_size=1, img_size=32, seconds=0.01)


def test_too_large_batches_name_the_options_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed, "train_step", fail)
    assert cli.main(["benchmark", MODEL, "--device", "cpu", "--batch-size", "4", "--img-size", "32"]) == 1
    error = capsys.readouterr().err
    assert (
        "4 images of 32 pixels does not fit into the memory of cpu; choose a smaller --batch-size or --img-size"
        in error
    )


def test_all_parts_of_the_layer_have_an_effect() -> None:
    model = speed.as_if_trained(timm.create_model(UBN_MODEL))
    fresh = dict(timm.create_model(UBN_MODEL).named_modules())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, UnifiedBatchNorm2d)}
    assert layers
    for name, layer in layers.items():
        for parameter, initial in zip(
            layer.parameters(recurse=False), fresh[name].parameters(recurse=False), strict=True
        ):
            assert (parameter != initial).any()


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_steps_run_the_documented_computation(amp: torch.dtype | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, targets = speed.random_batch(4, 8, 4, torch.device("cpu"), torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last) and targets.max() < 4
    dtypes = []
    model[0].register_forward_hook(lambda _layer, _inputs, output: dtypes.append((output.dtype, output.is_inference())))
    speed.train_step(model, images, targets, amp)()
    assert model.training and all(parameter.grad is not None for parameter in model.parameters())
    speed.eval_step(model, images, amp)()
    assert not model.training
    assert dtypes == [(amp or torch.float32, False), (amp or torch.float32, True)]


def test_the_command_prints_a_table_and_writes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    FakeMachine(monkeypatch)
    path = tmp_path / "new" / "speed.csv"
    arguments = ["--batch-size", "2", "--img-size", "32", "--seconds", "0.01", "--device", "cpu", "--amp", "bfloat16"]
    assert cli.main(["benchmark", UBN_MODEL, *arguments, "--output", str(path)]) == 0
    about, _, header, *table, _, written = capsys.readouterr().out.splitlines()
    assert "batch 2, 32 pixels, AMP bfloat16, channels last" in about
    assert header.split("  ")[0] == "MODE" and written == f"written: {path}"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table) == 2 * len(speed.MODES)
    for row, line in zip(rows, table, strict=True):
        assert line.startswith(row["mode"]) and row["model"] in line.split()
        assert f"{float(row['images_per_second']):.1f}" in line.split()
        assert f"{float(row['milliseconds']):.2f}" in line.split()
        assert (f"{float(row['ratio']):.2f} (" in line) == (row["model"] == UBN_MODEL)
        assert (row["amp"], row["peak_memory"], line.split()[-1]) == ("bfloat16", "", "-")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu() -> None:
    rows = speed.compare_speed(MODEL, batch_size=16, img_size=64, device="cuda", seconds=0.1)
    training, _, inference, *_ = (row.peak_memory for row in rows)
    assert training is not None and inference is not None
    assert training > inference > 16 * 3 * 64 * 64 * 4 / 2**20
