"""Freezing: running statistics in training too, fixed state and parameters, and unfreezing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import ubn_zoo

from .common import (
    OPEN,
    PARAMETERS,
    SHUT,
    assert_step,
    make_layer,
    random_input,
    randomize,
    snapshot,
    step,
    ubn_layers,
)
from .tolerances import OUTPUT

F32, F64 = torch.float32, torch.float64
CLASSES = [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d]


def small_model() -> nn.Module:
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            ubn_zoo.UnifiedBatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            ubn_zoo.UnifiedBatchNormAct2d(4),
        )
    ).double()


@pytest.mark.parametrize("gate", [OPEN, SHUT])
@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_layer_in_training_is_the_layer_in_evaluation(cls: type[nn.Module], gate: float) -> None:
    layer = make_layer(3, cls=cls, gate=gate, dtype=F64)
    x, grad_y = random_input((4, 3, 5, 5))
    y, grad_x = step(copy.deepcopy(layer).eval(), x, grad_y)
    before = snapshot(layer)
    frozen = ubn_zoo.freeze_ubn(layer)
    assert frozen is layer
    y_frozen, grad_frozen = step(frozen.train(), x, grad_y)
    torch.testing.assert_close(y_frozen, y, **OUTPUT[F64].kwargs())
    torch.testing.assert_close(grad_frozen, grad_x, **OUTPUT[F64].kwargs())
    for name, value in snapshot(frozen).items():
        assert torch.equal(value, before[name]), name


def test_frozen_parameters_take_no_gradient_and_others_do() -> None:
    model = ubn_zoo.freeze_ubn(small_model()).train()
    model(random_input((2, 3, 9, 9))[0]).sum().backward()
    for layer in ubn_layers(model):
        for name in PARAMETERS:
            assert getattr(layer, name).grad is None
            assert not getattr(layer, name).requires_grad
    assert model[0].weight.grad is not None


def test_train_does_not_unfreeze() -> None:
    model = ubn_zoo.freeze_ubn(small_model())
    before = snapshot(model)
    for mode in (False, True):
        model.train(mode)
        model(random_input((2, 3, 9, 9))[0])
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_one_value_per_channel_is_fine_when_frozen() -> None:
    layer = ubn_zoo.freeze_ubn(make_layer(3)).train()
    assert layer(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_unfreezing_restores_training(cls: type[nn.Module]) -> None:
    layer = make_layer(3, cls=cls, dtype=F64)
    twin = copy.deepcopy(layer)
    layer = ubn_zoo.unfreeze_ubn(ubn_zoo.freeze_ubn(layer))
    x, grad_y = random_input((4, 3, 5, 5))
    y, grad_x = step(layer, x, grad_y)
    y_twin, grad_twin = step(twin, x, grad_y)
    assert torch.equal(y, y_twin)
    assert torch.equal(grad_x, grad_twin)
    for name, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    for name in PARAMETERS:
        assert torch.equal(getattr(layer, name).grad, getattr(twin, name).grad), name


def test_unfrozen_layer_matches_the_reference() -> None:
    assert_step(ubn_zoo.unfreeze_ubn(ubn_zoo.freeze_ubn(make_layer(3, dtype=F64))), *random_input((4, 3, 5, 5)))


def test_requires_grad_is_restored() -> None:
    model = small_model()
    model[1].weight.requires_grad_(False)
    model[4].scale_bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for _ in range(2):
        # Freezing twice must not overwrite the record of trainable parameters.
        ubn_zoo.freeze_ubn(model)
    assert not any(p.requires_grad for layer in ubn_layers(model) for p in layer.parameters())
    ubn_zoo.unfreeze_ubn(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_unfreezing_an_unfrozen_layer_changes_nothing() -> None:
    model = small_model()
    model[1].weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ubn_zoo.unfreeze_ubn(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_training_mode_is_kept() -> None:
    model = small_model()
    model[1].eval()
    ubn_zoo.unfreeze_ubn(ubn_zoo.freeze_ubn(model))
    assert [layer.training for layer in ubn_layers(model)] == [False, True]


def test_same_keys_and_parameters() -> None:
    model = small_model()
    keys, identities = list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    ubn_zoo.freeze_ubn(model)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    small_model().load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],  # noqa: S301  # made in this test
    ids=["deepcopy", "pickle"],
)
def test_copies_stay_frozen(duplicate) -> None:
    layer = duplicate(ubn_zoo.freeze_ubn(make_layer(3))).train()
    before = snapshot(layer)
    layer(torch.randn(4, 3, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in snapshot(layer).items())


def test_only_ubn_layers_are_frozen() -> None:
    model = nn.Sequential(make_layer(3), nn.BatchNorm2d(3))
    ubn_zoo.freeze_ubn(model).train()
    model(torch.randn(4, 3, 5, 5))
    assert int(model[0].num_batches_tracked) == 0
    assert int(model[1].num_batches_tracked) == 1
    assert model[1].weight.requires_grad


def test_part_of_a_model() -> None:
    model = small_model()
    ubn_zoo.freeze_ubn(model[:2])
    model(random_input((2, 3, 9, 9))[0])
    assert [int(layer.num_batches_tracked) for layer in ubn_layers(model)] == [0, 1]


@pytest.mark.parametrize("function", [ubn_zoo.freeze_ubn, ubn_zoo.unfreeze_ubn])
def test_nothing_to_freeze_raises(function) -> None:
    with pytest.raises(ValueError, match="UBN"):
        function(nn.Sequential(nn.BatchNorm2d(3)))


def test_layer_without_running_statistics_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="running"):
        ubn_zoo.freeze_ubn(make_layer(3, track_running_stats=False))
