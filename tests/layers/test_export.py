"""Compilation, export, ONNX, scripting and tracing."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import ubn_zoo

from .common import (
    OPEN,
    SHUT,
    assert_step,
    gradients,
    make_layer,
    random_input,
    randomize,
    snapshot,
    ubn_layers,
)
from .tolerances import EXPORTED, OUTPUT

F32 = torch.float32
deprecated = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
CLASSES = [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d]


def small_model(gate: float = OPEN, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            ubn_zoo.UnifiedBatchNormAct2d(4, **settings),
            nn.Conv2d(4, 5, 3, bias=False),
            ubn_zoo.UnifiedBatchNorm2d(5, **settings),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        gate=gate,
    )


@pytest.fixture(scope="module")
def zoo_model() -> nn.Module:
    """timm's smallest ResNet with UBN instead of BatchNorm and with calibrations that have an effect."""
    torch.manual_seed(0)
    model = ubn_zoo.convert_batchnorm(timm.create_model("test_resnet", num_classes=7))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in ubn_layers(model):
            layer.weight.add_(0.1 * torch.randn(layer.weight.shape, generator=generator))
            for name in ("center_weight", "scale_weight", "running_mean"):
                tensor = getattr(layer, name)
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def compare(model: nn.Module, backend: str, steps: int = 3) -> None:
        """Outputs, gradients and state of compiled and eager steps."""
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for seed in range(steps):
            x, _ = random_input((4, 3, 9, 8), seed, F32, shared=0.3 * seed)
            leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
            outputs = compiled(leaves[0]), twin(leaves[1])
            torch.testing.assert_close(*outputs, **OUTPUT[F32].kwargs())
            for m, y in zip((model, twin), outputs, strict=True):
                m.zero_grad()
                y.sin().sum().backward()
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
            expected = gradients(twin)
            for name, value in gradients(model).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)
            state = snapshot(twin)
            for name, value in snapshot(model).items():
                torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6, msg=name)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"threshold": None, "kernel_size": 1}], ids=str)
    def test_in_one_graph(self, settings: dict, training: bool) -> None:
        self.compare(small_model(**settings).train(training), "aot_eager")

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"kernel_size": 5},
            {"affine": False},
            {"center_calibration": False},
            {"scale_calibration": False},
            {"track_running_stats": False},
        ],
        ids=str,
    )
    def test_against_reference(self, settings: dict, gate: float, channels_last: bool) -> None:
        layer = torch.compile(make_layer(3, gate=gate, dtype=torch.float64, **settings), backend="aot_eager")
        x, grad_y = random_input((4, 3, 6, 5))
        if channels_last:
            x, grad_y = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad_y))
        assert_step(layer, x, grad_y)

    def test_saved_for_backward(self) -> None:
        """The input is the only saved tensor of its size, as in eager mode."""
        layer = torch.compile(make_layer(3), fullgraph=True, backend="aot_eager")
        x = random_input((4, 3, 16, 16), dtype=F32)[0].requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            layer(x)
        assert sum(tensor.numel() >= x.numel() for tensor in kept) == 1

    def test_across_the_gate_without_recompilation(self) -> None:
        """The gate flips between steps without another graph."""
        model = small_model(gate=0.4, similarity_momentum=0.6)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        twin = copy.deepcopy(model)
        sides = set()
        for seed in range(6):
            x = random_input((4, 3, 9, 8), seed, F32, shared=2.0 * (seed % 2))[0] - 0.3
            torch.testing.assert_close(compiled(x), twin(x), **OUTPUT[F32].kwargs())
            sides.add(bool(twin[1].feature_similarity > twin[1].threshold))
        assert sides == {True, False}
        assert counter.frame_count == 1
        for name, value in snapshot(twin).items():
            torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-5, atol=1e-6, msg=name)

    def test_batches_of_changing_size(self) -> None:
        model = nn.Sequential(make_layer(3))
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (4, 20, 7):
            x, _ = random_input((batch, 3, 6, 5), batch, F32)
            torch.testing.assert_close(compiled(x), twin(x), **OUTPUT[F32].kwargs())
        for name, value in snapshot(twin).items():
            torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-5, atol=1e-6, msg=name)

    @pytest.mark.parametrize("training", [True, False])
    def test_two_graphs_for_all_sizes(self, training: bool) -> None:
        """One for batches below ``similarity_samples`` and one for the others, whatever the images' sizes."""
        layer = make_layer(3, cls=ubn_zoo.UnifiedBatchNormAct2d).train(training)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        torch._dynamo.utils.counters.clear()
        for batch, size in ((2, 8), (3, 9), (15, 5), (16, 8), (17, 6), (40, 11), (7, 12), (64, 3), (5, 4), (9, 7)):
            x = torch.randn(batch, 3, size, size + 1, requires_grad=training)
            y = compiled(x)
            if training:
                y.sum().backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

    def test_autocast(self) -> None:
        model = small_model()
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x, _ = random_input((4, 3, 9, 8), dtype=F32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = compiled(x), twin(x)
        torch.testing.assert_close(*outputs, **OUTPUT[torch.bfloat16].kwargs())
        outputs[0].float().sum().backward()
        assert model[1].running_mean.dtype == F32

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
    def test_inductor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gate flips during the test; generated code stays out of the user's cache."""
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        self.compare(nn.Sequential(make_layer(3, gate=0.5, similarity_momentum=0.6)), "inductor")

    def test_frozen_and_back(self) -> None:
        model = ubn_zoo.freeze_ubn(small_model())
        before = snapshot(model)
        self.compare(model, "aot_eager", steps=1)
        assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
        self.compare(ubn_zoo.unfreeze_ubn(model), "aot_eager", steps=1)
        assert int(model[1].num_batches_tracked) == 1


class TestTorchExport:
    def test_model(self, zoo_model: nn.Module) -> None:
        x = torch.randn(2, 3, 64, 64)
        program = torch.export.export(zoo_model, (x,))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), zoo_model(x), **EXPORTED.kwargs())

    @pytest.mark.parametrize("cls", CLASSES)
    def test_layer_with_any_batch_and_size(self, cls: type[nn.Module]) -> None:
        layer = make_layer(3, cls=cls).eval()
        dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        program = torch.export.export(layer, (torch.randn(4, 3, 8, 6),), dynamic_shapes=(dims,))
        for shape in [(2, 3, 5, 9), (9, 3, 12, 3)]:
            x = torch.randn(shape)
            torch.testing.assert_close(program.module()(x), layer(x), **OUTPUT[F32].kwargs())

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_training_step(self, momentum: float | None) -> None:
        """A training graph contains the state."""
        layer = make_layer(3, momentum=momentum)
        twin = copy.deepcopy(layer)
        program = torch.export.export(layer, (torch.randn(4, 3, 8, 6),)).module()
        for seed in range(2):
            x, _ = random_input((4, 3, 8, 6), seed, F32)
            torch.testing.assert_close(program(x), twin(x), **OUTPUT[F32].kwargs())
        found = dict(program.named_buffers())
        for name, value in snapshot(twin).items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)

    def test_exporting_changes_no_state(self) -> None:
        layer = make_layer(3)
        before = snapshot(layer)
        torch.export.export(layer, (torch.randn(4, 3, 8, 6),))
        assert all(torch.equal(value, before[name]) for name, value in snapshot(layer).items())


class TestOnnx:
    @staticmethod
    def run(model: nn.Module, path: Path, x: Tensor, others: list[Tensor] | None = None, **arguments: object) -> None:
        """Exports, runs with ONNX Runtime and compares the logits, for `x` and for further inputs."""
        runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
        pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False, **arguments)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        for sample in [x, *(others or [])]:
            (found,) = session.run(None, {entry.name: sample.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(found), model(sample), **EXPORTED.kwargs())

    def test_model(self, zoo_model: nn.Module, tmp_path: Path) -> None:
        self.run(zoo_model, tmp_path / "model.onnx", torch.randn(2, 3, 64, 64))

    def test_any_batch(self, tmp_path: Path) -> None:
        self.run(
            small_model().eval(),
            tmp_path / "model.onnx",
            torch.randn(2, 3, 9, 9),
            [torch.randn(5, 3, 9, 9), torch.randn(1, 3, 9, 9)],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )

    @pytest.mark.parametrize(
        "settings",
        [{"affine": False}, {"kernel_size": 1}, {"depthwise_affine": False, "center_calibration": False}],
        ids=str,
    )
    def test_settings(self, settings: dict, tmp_path: Path) -> None:
        self.run(make_layer(3, **settings).eval(), tmp_path / "layer.onnx", torch.randn(2, 3, 6, 5))


@deprecated
class TestScript:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}, {"threshold": None}], ids=str)
    @pytest.mark.parametrize("cls", CLASSES)
    def test_layer(self, cls: type[nn.Module], settings: dict, training: bool) -> None:
        layer = make_layer(3, cls=cls, **settings).train(training)
        twin = copy.deepcopy(layer)
        scripted = torch.jit.script(layer)
        for seed in range(2):
            x, grad_y = random_input((4, 3, 6, 5), seed, F32)
            leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
            outputs = scripted(leaves[0]), twin(leaves[1])
            torch.testing.assert_close(*outputs, **OUTPUT[F32].kwargs())
            for y in outputs:
                y.backward(grad_y)
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
        found = dict(scripted.named_buffers())
        for name, value in snapshot(twin).items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)

    def test_switching_mode_after_scripting(self) -> None:
        layer = make_layer(3)
        scripted = torch.jit.script(layer)
        x, _ = random_input((4, 3, 6, 5), dtype=F32)
        expected = copy.deepcopy(layer).eval()(x)
        torch.testing.assert_close(scripted.eval()(x), expected, **OUTPUT[F32].kwargs())

    def test_model_saved_and_loaded(self, zoo_model: nn.Module, tmp_path: Path) -> None:
        torch.jit.script(zoo_model).save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), zoo_model(x), **EXPORTED.kwargs())

    @pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 5, 5)], ids=str)
    def test_wrong_input_is_refused(self, shape: tuple[int, ...]) -> None:
        scripted = torch.jit.script(make_layer(3))
        with pytest.raises((RuntimeError, torch.jit.Error)):
            scripted(torch.zeros(shape))


@deprecated
class TestTrace:
    def test_model(self, zoo_model: nn.Module) -> None:
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            traced = torch.jit.trace(zoo_model, x)
            other = torch.randn(3, 3, 64, 64)
            torch.testing.assert_close(traced(other), zoo_model(other), **EXPORTED.kwargs())

    @pytest.mark.parametrize("cls", CLASSES)
    def test_layer(self, cls: type[nn.Module]) -> None:
        layer = make_layer(3, cls=cls).eval()
        traced = torch.jit.trace(layer, torch.randn(2, 3, 6, 5))
        x = torch.randn(4, 3, 9, 7)
        torch.testing.assert_close(traced(x), layer(x), **OUTPUT[F32].kwargs())
