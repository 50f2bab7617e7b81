"""FLOP counters, compared with a count by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.interop.common import images, twin, ubn_layers
from ubn_zoo import UnifiedBatchNorm2d, UnifiedBatchNormAct2d, interop

pytestmark = pytest.mark.interop
C, H, W = 4, 6, 5


@pytest.fixture
def installed() -> Iterator[None]:
    with interop.install():
        yield


def model() -> nn.Module:
    """3 x 3 taps, one tap, and none."""
    return nn.Sequential(
        UnifiedBatchNorm2d(C),
        UnifiedBatchNormAct2d(C, kernel_size=1, center_calibration=False, scale_calibration=False, apply_act=False),
        UnifiedBatchNorm2d(C, affine=False, scale_calibration=False),
    ).eval()


INPUT = (1, C, H, W)
# Means, normalization, taps, scaling.
EXPECTED = C * H * W * ((1 + 1 + 9 + 1) + (1 + 1) + (1 + 1))
TAPS = C * H * W * (9 + 1)


def test_multiply_adds() -> None:
    x = torch.zeros(INPUT)
    assert sum(interop.multiply_adds(layer, x) for layer in model()) == EXPECTED


def test_torch_counts_only_the_affine() -> None:
    # Borders of a padded convolution count like other positions.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model()[0](torch.zeros(INPUT))
    assert counter.get_total_flops() == 2 * C * H * W * 9


def test_thop(installed: None) -> None:
    thop = pytest.importorskip("thop")
    operations, _ = thop.profile(model(), (torch.zeros(INPUT),), verbose=False)
    assert operations == EXPECTED


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(installed: None, backend: str) -> None:
    ptflops = pytest.importorskip("ptflops")
    options: dict[str, Any] = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    count, _ = ptflops.get_model_complexity_info(model(), INPUT[1:], backend=backend, **options)
    if backend == "pytorch":
        # Some of the layer's additions and multiplications count once more, as operations.
        assert EXPECTED <= count <= 1.2 * EXPECTED
    else:
        # It counts operations, not layers, so without `install()` it counts only the convolutions.
        assert count >= C * H * W * 9


def test_calflops(installed: None) -> None:
    calflops = pytest.importorskip("calflops")
    flops, macs, _ = calflops.calculate_flops(
        model(), INPUT, print_results=False, print_detailed=False, output_as_string=False
    )
    # Some of the layer's additions and multiplications count once more, as operations.
    assert macs == EXPECTED and 2 * EXPECTED <= flops <= 2.2 * EXPECTED


def test_fvcore_counts_only_the_affine() -> None:
    nn_ = pytest.importorskip("fvcore.nn")
    counted = nn_.FlopCountAnalysis(model()[0], torch.zeros(INPUT)).unsupported_ops_warnings(False)
    assert counted.by_operator()["conv"] == C * H * W * 9


def test_a_model_is_counted_as_the_sum_of_its_parts(installed: None) -> None:
    thop = pytest.importorskip("thop")
    whole = twin().eval()
    seen: list[int] = []

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(interop.multiply_adds(layer, inputs[0]))

    for layer in ubn_layers(whole):
        layer.register_forward_hook(count)
    whole(images(1))
    with_ubn, _ = thop.profile(twin().eval(), (images(1),), verbose=False)
    interop.uninstall()
    without, _ = thop.profile(twin().eval(), (images(1),), verbose=False)
    assert with_ubn - without == sum(seen) > 0
