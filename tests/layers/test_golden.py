"""The layer and the reference equations, compared with outputs of the paper authors' layer.

The values are next to a developer's checkout, not in the repository, so these tests are skipped elsewhere. Other tests
compare with `reference.py`, which is checked against the same values here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from . import reference
from .common import PATHS
from .tolerances import GOLDEN

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FILES = sorted(FOLDER.glob("*.safetensors"))
CASES = [pytest.param(path, id=path.stem) for path in FILES] or [
    pytest.param(None, id="absent", marks=pytest.mark.skip(reason=f"no golden values in {FOLDER}"))
]


@dataclass(frozen=True)
class Case:
    settings: dict[str, object]
    gates: list[bool]
    affine: bool
    tensors: dict[str, Tensor]

    def at(self, step: int, name: str) -> Tensor:
        return self.tensors[f"step{step:02d}.{name}"]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {
            name: self.tensors[name]
            for name in ("weight", "bias", "center_weight", "scale_weight", "scale_bias")
            if name in self.tensors
        }


def load(path: Path) -> Case:
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping, it cannot be iterated
    settings = {name: metadata[name] for name in ("eps", "momentum", "threshold", "kernel_size")}
    assert len(metadata["gates"]) == metadata["steps"]
    return Case(settings, metadata["gates"], metadata["affine"], tensors)


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual.double().reshape(expected.shape),
        expected.double(),
        **GOLDEN.kwargs(),
        msg=lambda text: f"{what}: {text}",
    )


@pytest.mark.parametrize("cls", PATHS, ids=["layer", "functional"])
@pytest.mark.parametrize("path", CASES)
def test_layer_reproduces_golden(path: Path, cls: type[torch.nn.Module]) -> None:
    case = load(path)
    layer = cls(case.at(0, "x").shape[1], affine=case.affine, dtype=torch.float64, **case.settings)
    with torch.no_grad():
        for name, value in case.parameters.items():
            getattr(layer, name).copy_(value)
    gates = []
    for i in range(len(case.gates)):
        layer.zero_grad()
        before = layer.running_mean.clone(), layer.running_var.clone()
        x = case.at(i, "x").clone().requires_grad_()
        y = layer(x)
        y.backward(case.at(i, "grad_y"))
        gates.append(bool(layer.feature_similarity > case.settings["threshold"]))
        close(y, case.at(i, "y"), f"step {i}: y")
        close(x.grad, case.at(i, "grad_x"), f"step {i}: grad_x")
        for name in case.parameters:
            close(getattr(layer, name).grad, case.at(i, f"grad_{name}"), f"step {i}: grad_{name}")
        for name in ("running_mean", "running_var"):
            close(getattr(layer, name), case.at(i, name), f"step {i}: {name}")
        close(layer.feature_similarity, case.at(i, "moving_cos"), f"step {i}: feature_similarity")
        if not gates[-1]:
            assert torch.equal(layer.running_mean, before[0])
            assert torch.equal(layer.running_var, before[1])
    assert gates == case.gates
    assert int(layer.num_batches_tracked) == len(case.gates)
    layer.eval()
    with torch.no_grad():
        close(layer(case.tensors["eval.x"]), case.tensors["eval.y"], "evaluation")


@pytest.mark.parametrize("path", CASES)
def test_reference_reproduces_golden(path: Path) -> None:
    case = load(path)
    settings = reference.Settings(
        eps=case.settings["eps"], momentum=case.settings["momentum"], threshold=case.settings["threshold"]
    )
    parameters = reference.Parameters(**case.parameters)
    channels = case.at(0, "x").shape[1]
    state = reference.State(torch.zeros(channels).double(), torch.ones(channels).double())
    for i, gate in enumerate(case.gates):
        result = reference.run(case.at(i, "x"), case.at(i, "grad_y"), parameters, state, settings)
        state = result.state
        assert result.gate == gate
        close(result.y, case.at(i, "y"), f"step {i}: y")
        close(result.grad_x, case.at(i, "grad_x"), f"step {i}: grad_x")
        for name, grad in result.grads.items():
            close(grad, case.at(i, f"grad_{name}"), f"step {i}: grad_{name}")
        close(state.running_mean, case.at(i, "running_mean"), f"step {i}: running_mean")
        close(state.running_var, case.at(i, "running_var"), f"step {i}: running_var")
        close(torch.tensor([state.feature_similarity]), case.at(i, "moving_cos"), f"step {i}: feature_similarity")
    y, _, _ = reference.forward(case.tensors["eval.x"], parameters, state, settings, training=False)
    close(y, case.tensors["eval.y"], "evaluation")
