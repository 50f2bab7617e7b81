"""Quantization and runtimes: a twin is as accurate as its sibling."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.interop.common import SIBLING, TWIN, images
from ubn_zoo import fuse

pytestmark = pytest.mark.interop


def trained(name: str, fused: bool) -> nn.Module:
    """A model with statistics of real data, so that activations have a typical size."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).train()
    with torch.no_grad():
        for seed in range(3):
            model(images(8, seed=seed))
    model.eval()
    return fuse(model) if fused else model


def error(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        expected = model(images(8))
        return float((other(images(8)) - expected).norm() / expected.norm())


CASES = pytest.mark.parametrize(("name", "fused"), [(TWIN, False), (TWIN, True), (SIBLING, False)])


@CASES
def test_fx(name: str, fused: bool) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = trained(name, fused)
    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (images(),))
    prepared(images(8))
    quantized = convert_fx(prepared)
    convolutions = [m for m in quantized.modules() if "quantized" in type(m).__module__ and "Conv" in type(m).__name__]
    assert len(convolutions) >= 12
    assert error(model, quantized) < 0.2


@CASES
def test_pt2e(name: str, fused: bool) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model = trained(name, fused)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images(8),), dynamic_shapes=({0: batch},)).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(images(8))
    quantized = convert_pt2e(prepared)
    assert sum("quantize_per_channel" in str(node.target) for node in quantized.graph.nodes) >= 12
    assert error(model, quantized) < 0.2


@CASES
def test_torchao_weights(name: str, fused: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, quantized = trained(name, fused), trained(name, fused)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    assert type(quantized.get_classifier().weight) is not nn.Parameter
    assert error(model, quantized) < 0.05


@CASES
def test_openvino(name: str, fused: bool) -> None:
    openvino = pytest.importorskip("openvino")
    model = trained(name, fused)
    converted = openvino.convert_model(model, example_input=images(8))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0])

    with torch.no_grad():
        torch.testing.assert_close(run(images(8)), model(images(8)), rtol=1e-3, atol=1e-4)


@CASES
def test_onnxruntime(name: str, fused: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = trained(name, fused), tmp_path / "model.onnx"
    torch.onnx.export(model, (images(8),), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output = session.run(None, {session.get_inputs()[0].name: images(8).numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), model(images(8)), rtol=1e-3, atol=1e-4)
