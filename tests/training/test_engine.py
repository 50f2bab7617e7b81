"""The training loop on small synthetic images: it learns, is deterministic and resumes, with every setting."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from tests.images import RECIPE, striped_images
from ubn_zoo.data.loaders import MemoryEval, MemoryTrain
from ubn_zoo.errors import DataError, TrainingError
from ubn_zoo.evaluation.metrics import EpochMetrics
from ubn_zoo.layers import UnifiedBatchNorm2d
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training import engine
from ubn_zoo.training.build import build_model, build_optimizer, build_scheduler, complete
from ubn_zoo.training.checkpoint import Snapshot
from ubn_zoo.training.engine import Outcome, fit, gate_state
from ubn_zoo.utils.distributed import Ranks

TRAIN = striped_images(64, seed=1)
TEST = striped_images(32, seed=2)


def train(recipe: Recipe, model: nn.Module | None = None, **options: Any) -> Outcome:
    batches = MemoryTrain(recipe, TRAIN, Ranks()), MemoryEval(recipe, TEST, Ranks())
    return fit(recipe, model or build_model(recipe), *batches, **options)


def change(**settings: Any) -> Recipe:
    return dataclasses.replace(RECIPE, **settings)


def timeless(row: EpochMetrics) -> EpochMetrics:
    """A row without times."""
    return dataclasses.replace(row, seconds=0.0, step_ms=0.0, images_per_second=0.0)


def assert_same(first: Outcome, second: Outcome) -> None:
    """Bitwise equal."""
    assert list(map(timeless, first.metrics)) == list(map(timeless, second.metrics))
    assert first.similarity == second.similarity
    for one, other in ((first.model, second.model), (first.ema, second.ema)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            states = one.state_dict(), other.state_dict()
            assert list(states[0]) == list(states[1])
            for name, tensor in states[0].items():
                assert torch.equal(tensor, states[1][name]), name


def test_twins_start_from_the_same_function() -> None:
    images = torch.rand(4, 3, 32, 32)
    logits = [build_model(change(norm=norm)).eval()(images) for norm in ("bn", "ubn", "rbn", "bnet")]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "gated", "centered", "kernel"),
    [("ubn", True, True, 5), ("rbn", False, True, 1), ("bnet", False, False, 5)],
)
def test_norms_are_settings_of_one_layer(norm: str, gated: bool, centered: bool, kernel: int) -> None:
    model = build_model(change(norm=norm, kernel_size=5, threshold=0.3))
    layers = [module for module in model.modules() if isinstance(module, UnifiedBatchNorm2d)]
    assert layers
    for layer in layers:
        assert layer.threshold == (0.3 if gated else None)
        assert (layer.center_weight is not None) == (layer.scale_weight is not None) == centered
        assert layer.weight.shape[-1] == kernel
    assert (gate_state(model) is not None) == gated


def test_ubn_without_a_gate_and_with_random_kernels() -> None:
    model = build_model(change(threshold=None, kernel_init="kaiming"))
    assert gate_state(model) is None
    kernels = [module.weight for module in model.modules() if isinstance(module, UnifiedBatchNorm2d)]
    assert any((kernel.detach().flatten(2)[..., 0] != 0).any() for kernel in kernels)


def test_gate_state_counts_layers_above_their_threshold() -> None:
    model = nn.Sequential(
        *(UnifiedBatchNorm2d(2, threshold=0.5) for _ in range(3)), UnifiedBatchNorm2d(2, threshold=None)
    )
    for layer, similarity in zip(model, (0.25, 0.75, 1.0, 1.0), strict=True):
        layer.feature_similarity.fill_(similarity)
    state = gate_state(model)
    assert state is not None
    assert (state.low, state.mean, state.high, state.open, state.layers) == (0.25, pytest.approx(2 / 3), 1.0, 2, 3)
    assert gate_state(nn.BatchNorm2d(2)) is None


@pytest.mark.parametrize("norm", ["ubn", "rbn", "bnet", "bn"])
@pytest.mark.parametrize("norm_decay", [False, True])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_norm_parameters_and_biases_decay_only_if_asked(norm: str, norm_decay: bool, layer_decay: float | None) -> None:
    recipe = change(weight_decay=0.25, norm=norm, norm_decay=norm_decay, layer_decay=layer_decay)
    model = build_model(recipe)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(recipe, model).param_groups
        for parameter in group["params"]
    }
    kinds = (UnifiedBatchNorm2d, nn.BatchNorm2d)
    norms = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        plain = id(parameter) in norms or name.endswith("bias")
        assert decay[id(parameter)] == (0.0 if plain and not norm_decay else 0.25), name


@pytest.mark.parametrize("saved", [1, 2, 4])
def test_loss_of_an_epoch_that_started_on_more_ranks(saved: int) -> None:
    """A run that several ranks saved resumes on one rank with the same mean loss."""
    recipe = change(epochs=1, checkpoint_steps=3)
    snapshots: list[Snapshot] = []
    whole = train(recipe, on_save=lambda snapshot: snapshots.append(copy.deepcopy(snapshot)))
    (first, *_) = snapshots
    progress = {**first.progress, "totals": first.progress["totals"].repeat(saved)}
    again = train(recipe, start=dataclasses.replace(first, progress=progress))
    assert again.metrics[-1].train_loss == pytest.approx(whole.metrics[-1].train_loss, rel=1e-6)


def test_optimizer_options() -> None:
    optimizer = build_optimizer(change(optimizer="sgd", momentum=0.8), nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["nesterov"] and group["momentum"] == 0.8 for group in optimizer.param_groups)
    optimizer = build_optimizer(change(betas=(0.5, 0.75), optimizer_eps=1e-3), nn.Linear(2, 2))
    assert all(group["betas"] == (0.5, 0.75) and group["eps"] == 1e-3 for group in optimizer.param_groups)


@pytest.mark.parametrize("norm_decay", [False, True])
def test_layer_decay_slows_early_layers(norm_decay: bool) -> None:
    recipe = change(layer_decay=0.5, norm_decay=norm_decay)
    model = build_model(recipe)
    optimizer = build_optimizer(recipe, model)
    build_scheduler(recipe, optimizer, 4).step_update(4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert (
        named["conv1.0.weight"] < named["layer1.0.conv1.weight"] < named["layer4.0.conv1.weight"] < named["fc.weight"]
    )
    assert named["layer4.0.bn1.weight"] == named["layer4.0.conv1.weight"]


def rates(recipe: Recipe, steps: int, updates: list[int]) -> list[float]:
    optimizer = build_optimizer(recipe, nn.Linear(2, 2))
    scheduler = build_scheduler(recipe, optimizer, steps)
    found = []
    for update in updates:
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedules() -> None:
    common: dict[str, Any] = {"lr": 2.0, "epochs": 5, "warmup_epochs": 1.0}
    # A cosine over all five epochs, seen from the end of the warm-up on.
    expected = [0.0, 1.0, 2 * 0.5 * (1 + math.cos(math.pi / 5)), 2 * 0.5 * (1 + math.cos(0.6 * math.pi))]
    assert rates(change(**common), 10, [0, 5, 10, 30]) == pytest.approx(expected)
    # A cosine that starts after the warm-up.
    assert rates(change(**common, warmup_prefix=True), 10, [10, 30, 50]) == pytest.approx([2.0, 1.0, 0.0], abs=1e-9)
    step = change(lr=1.0, epochs=100, warmup_epochs=0.0, scheduler="step", decay_epochs=30.0)
    assert rates(step, 10, [299, 300, 600, 999]) == pytest.approx([1.0, 0.1, 0.01, 0.001])
    drops = change(
        lr=1.0, epochs=9, warmup_epochs=0.0, scheduler="multistep", decay_milestones=(2.0, 6.0), decay_rate=0.5
    )
    # timm drops one update early.
    assert rates(drops, 10, [18, 20, 58, 60]) == pytest.approx([1.0, 0.5, 0.5, 0.25])
    poly = change(lr=1.0, epochs=4, warmup_epochs=0.0, scheduler="poly", decay_rate=1.0)
    assert rates(poly, 10, [0, 20, 40]) == pytest.approx([1.0, 0.5, 0.0])
    assert rates(change(lr=1.0, warmup_epochs=0.0, scheduler="constant"), 10, [0, 19]) == [1.0, 1.0]


def test_unset_fields_come_from_the_model() -> None:
    blank = change(img_size=None, interpolation=None, crop_pct=None, mean=None, std=None, dataset="folder", crop="rrc")
    filled = complete(blank)
    cfg = timm.get_pretrained_cfg("resnet10t_ubn")
    assert cfg is not None
    assert (filled.img_size, filled.interpolation, filled.crop_pct) == (
        cfg.input_size[-1],
        cfg.interpolation,
        cfg.crop_pct,
    )
    assert (filled.mean, filled.std) == (cfg.mean, cfg.std)
    assert complete(RECIPE) == RECIPE
    with pytest.raises(TrainingError, match=r"model: received 'resnet51' \(norm ubn\); valid: resnet"):
        complete(change(model="resnet51"))
    with pytest.raises(TrainingError, match="pretrained_tag: resnet10t_ubn.nothing is none of timm's"):
        complete(change(pretrained=True, pretrained_tag="nothing"))


def test_weights_to_start_from(tmp_path: Path) -> None:
    source = build_model(change(seed=7))
    path = tmp_path / "start.safetensors"
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    safetensors.torch.save_file(state, path)
    model = build_model(change(checkpoint=str(path), keep_head=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    for classes in (2, 5):
        other = build_model(change(checkpoint=str(path), num_classes=classes))
        fresh = build_model(change(num_classes=classes))
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, fresh.state_dict()[name] if name.startswith("fc.") else state[name]), name
    with pytest.raises((RuntimeError, ValueError), match="fc"):
        build_model(change(checkpoint=str(path), num_classes=5, keep_head=True))
    # A BatchNorm checkpoint starts a UBN model that computes the same.
    sibling = build_model(change(norm="bn", seed=8))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in sibling.state_dict().items()}, path)
    converted = build_model(change(checkpoint=str(path), keep_head=True))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(converted.eval()(images), sibling.eval()(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(TrainingError, match="cannot be read as safetensors"):
        build_model(change(checkpoint=str(tmp_path / "absent.safetensors")))
    del state["fc.bias"]
    safetensors.torch.save_file(state, path)
    with pytest.raises((RuntimeError, ValueError), match=r"fc\.bias"):
        build_model(change(checkpoint=str(path)))


def test_pretrained_weights_get_a_new_classifier() -> None:
    bundled: dict[str, Any] = {"model": "regnetx_002", "pretrained": True, "pretrained_tag": "cifar10"}
    kept = build_model(change(**bundled, num_classes=10, keep_head=True))
    upstream = timm.create_model("regnetx_002_ubn.cifar10", pretrained=True)
    assert all(torch.equal(kept.state_dict()[name], tensor) for name, tensor in upstream.state_dict().items())
    anew = build_model(change(**bundled, num_classes=10))
    for name, tensor in upstream.state_dict().items():
        assert torch.equal(anew.state_dict()[name], tensor) == (not name.startswith("head.fc")), name


def test_it_learns() -> None:
    outcome = train(change(epochs=5))
    assert outcome.finished
    assert outcome.metrics[-1].top1 >= 90.0
    assert outcome.metrics[-1].train_loss < outcome.metrics[0].train_loss
    assert [row.step for row in outcome.metrics] == [8, 16, 24, 32, 40]
    layers = {row.layer for row in outcome.similarity}
    assert len(outcome.similarity) == 5 * len(layers)
    assert len(layers) == 14
    assert all(row.gate in ("open", "closed") for row in outcome.similarity)


@pytest.mark.parametrize("norm", ["ubn", "bn"])
def test_the_same_seed_gives_the_same_numbers(norm: str) -> None:
    recipe = change(norm=norm)
    first, second = train(recipe), train(recipe)
    assert_same(first, second)
    third = train(dataclasses.replace(recipe, seed=4))
    assert third.metrics[-1].train_loss != first.metrics[-1].train_loss


# Every setting that has state or draws random numbers.
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bn": {"norm": "bn", "optimizer": "sgd", "lr": 0.05},
    "ema": {"ema_decay": 0.9},
    "lamb": {"optimizer": "lamb", "loss": "bce", "bce_threshold": 0.2},
    "mixup": {"mixup": 0.5, "cutmix": 1.0, "random_erasing": 0.5, "drop_path_rate": 0.2, "drop_rate": 0.3},
    "float16": {"amp": "float16", "clip_grad": 1.0},
    "parts": {"accumulation": 2, "clip_grad": 0.05, "clip_mode": "agc", "img_size": 24},
    "checkpointing": {"grad_checkpointing": True, "amp": "bfloat16", "clip_grad": 0.1, "clip_mode": "value"},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_run_that_resumes_from_any_update_ends_the_same(name: str) -> None:
    recipe = change(**SWITCHES[name], checkpoint_steps=3)
    saved: list[Snapshot] = []

    def keep(snapshot: Snapshot) -> None:
        copy = {key: value.clone() for key, value in snapshot.model.items()}
        ema = None if snapshot.ema is None else {key: value.clone() for key, value in snapshot.ema.items()}
        optimizer = torch.utils._pytree.tree_map(
            lambda value: value.clone() if isinstance(value, torch.Tensor) else value, dict(snapshot.optimizer)
        )
        saved.append(dataclasses.replace(snapshot, model=copy, ema=ema, optimizer=optimizer))

    whole = train(recipe, on_save=keep)
    assert [snapshot.updates for snapshot in saved] == [3, 6, 8, 11, 14, 16]
    assert all(math.isfinite(row.train_loss) for row in whole.metrics)
    for snapshot in (saved[0], saved[2], saved[4]):
        again = train(recipe, build_model(dataclasses.replace(recipe, seed=99)), start=snapshot)
        assert_same(again, whole)


def test_accumulation_is_one_batch_for_a_model_without_statistics() -> None:
    # The statistics of half a batch are not those of a batch; a frozen body has none.
    start = build_model(RECIPE)
    results = []
    for parts in (1, 4):
        recipe = change(pretrained=False, accumulation=parts, label_smoothing=0.0)
        model = build_model(recipe)
        model.load_state_dict(start.state_dict())
        for layer in model.modules():
            if isinstance(layer, UnifiedBatchNorm2d):
                layer.frozen = True
        results.append(train(recipe, model))
    assert results[1].metrics[-1].train_loss == pytest.approx(results[0].metrics[-1].train_loss, rel=1e-4)
    torch.testing.assert_close(results[1].model.state_dict(), results[0].model.state_dict(), rtol=1e-3, atol=1e-4)


def test_only_the_head_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    source = build_model(change(seed=7))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in source.state_dict().items()}, path)
    recipe = change(checkpoint=str(path), tune="head", drop_rate=0.1)
    outcome = train(recipe)
    for name, tensor in outcome.model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]) == (not name.startswith("fc.")), name
    assert outcome.metrics[-1].train_loss < outcome.metrics[0].train_loss


@pytest.mark.parametrize("norm", ["ubn", "bn"])
def test_statistics_that_are_kept_are_used_in_training(norm: str, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    source = build_model(change(norm=norm, seed=7))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in source.state_dict().items()}, path)
    outcome = train(change(norm=norm, checkpoint=str(path), norm_eval=True))
    before, after = source.state_dict(), outcome.model.state_dict()
    buffers = {name for name, _ in source.named_buffers()}
    assert {name for name in before if torch.equal(before[name], after[name])} == buffers


def test_the_moving_average_is_measured_beside_the_weights() -> None:
    plain, frozen, slow = (train(change(ema_decay=decay, ema_warmup=False)) for decay in (None, 0.0, 0.9))
    assert plain.ema is None
    assert plain.metrics[-1].ema_top1 is None
    # With decay 0 the average equals the model.
    assert frozen.metrics[-1].ema_test_loss == plain.metrics[-1].test_loss
    assert slow.metrics[-1].test_loss == plain.metrics[-1].test_loss
    assert slow.metrics[-1].ema_test_loss != plain.metrics[-1].test_loss


def test_mixup_can_end_before_the_last_epoch() -> None:
    always, never, half = (train(change(mixup=1.0, mixup_off_epoch=epoch)).metrics for epoch in (None, 0, 1))
    assert half[0].train_loss == always[0].train_loss != never[0].train_loss
    assert half[1].train_loss != always[1].train_loss


@pytest.mark.parametrize(("interval", "checks"), [(1, 18), (20, 9)])
def test_the_loss_is_logged_at_the_same_updates_on_every_device(
    interval: int, checks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator, where reading the loss synchronizes, logs the same updates with fewer checks."""
    real, made, logged = engine._check_loss, [], []

    def check(job: Any, stopping: bool) -> tuple[float, bool]:
        made.append(job.updates)
        return real(job, stopping)

    monkeypatch.setattr(engine, "_check_loss", check)
    monkeypatch.setattr(engine, "_check_interval", lambda device: interval)
    outcome = train(change(log_interval=3), on_loss=lambda *point: logged.append(point))
    assert [updates for updates, *_ in logged] == [3, 6, 8, 9, 12, 15, 16]
    means = {updates: mean for updates, mean, _ in logged}
    assert [means[row.step] for row in outcome.metrics] == [row.train_loss for row in outcome.metrics]
    assert len(made) == checks  # one more per epoch for its row


def test_a_requested_stop_saves_and_ends() -> None:
    saved: list[Snapshot] = []
    steps: list[int] = []
    outcome = train(
        RECIPE,
        on_step=lambda done, total: steps.append(done),
        on_save=saved.append,
        stopping=lambda: len(steps) >= 11,
    )
    assert not outcome.finished
    assert [row.epoch for row in outcome.metrics] == [1]
    assert saved[-1].updates == 12
    whole = train(RECIPE)
    assert_same(train(RECIPE, start=saved[-1]), whole)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(DataError, match="received 64 training images; valid: at least one batch of 66"):
        train(change(batch_size=66))
    with pytest.raises(TrainingError, match="num_classes: received null"):
        build_model(change(num_classes=None))
    with pytest.raises(TrainingError, match="the loss is nan at epoch 1 after update 1 of 8.*lower lr"):
        spoiled = build_model(RECIPE)
        nn.init.constant_(next(spoiled.parameters()), math.nan)
        train(RECIPE, spoiled)


def test_a_non_finite_state_is_not_saved() -> None:
    saved: list[Snapshot] = []

    class Spoiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(RECIPE)
            self.calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            return self.inner(images) * (math.nan if self.calls == 6 else 1.0)

    with pytest.raises(TrainingError, match="after update 6 of 8"):
        train(change(checkpoint_steps=2, probe_images=0), Spoiling(), on_save=saved.append)
    assert [snapshot.updates for snapshot in saved] == [2, 4]


class Small(nn.Module):
    """Two convolutions with UBN between them and a classifier, which compile in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), UnifiedBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten()
        )
        self.fc = nn.Linear(8 * 7 * 7, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(images))


@pytest.mark.parametrize(
    "build", [Small, pytest.param(lambda: build_model(RECIPE), marks=pytest.mark.exhaustive, id="resnet10t")]
)
def test_compiled_training_agrees(build: Callable[[], nn.Module]) -> None:
    recipe = change(epochs=1, probe_images=0)
    eager, compiled = (train(dataclasses.replace(recipe, compile=compile), build()) for compile in (False, True))
    assert compiled.metrics[0].train_loss == pytest.approx(eager.metrics[0].train_loss, rel=1e-3)
    assert eager.metrics[0].gates > 0
