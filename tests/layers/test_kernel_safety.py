"""Memory accesses of the Triton kernels, each checked in Triton's interpreter; see `kernel_detector.py`.

pytest -n0 tests/layers/test_kernel_safety.py -m "exhaustive or not exhaustive"  # more shapes, 5x5 taps
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ubn_zoo
from ubn_zoo.layers.kernels import operators

from .common import OPEN, SHUT, assert_results, gradients, make_layer, random_input, snapshot, step
from .kernel_detector import ORDERS, Detector, KernelError
from .reference import run_like
from .test_kernels import NATIVE, both_formats, forward, launching, statistics

if NATIVE:
    pytest.skip("the detector works in Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

STEP = ["_moments_kernel", "_combine_kernel", "_similarity_kernel", "_finalize_kernel", "_affine_kernel"]
BACKWARD = ["_sums_kernel", "_parameters_kernel", "_input_gradient_kernel"]
EVALUATION = ["_moments_kernel", "_affine_kernel"]


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Detector]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(operators, "DEVICES", {"cpu"})
    assert operators.usable(torch.ones(1, 1, 1, 1), 3)  # starts a kernel the first time
    torch.use_deterministic_algorithms(True)
    yield Detector(monkeypatch)
    torch.use_deterministic_algorithms(False)


def results(layer: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    y, grad_x = step(layer, x, grad_y)
    return {"y": y, "grad_x": grad_x, **gradients(layer), **snapshot(layer)}


def check(detector: Detector, layer: nn.Module, x: Tensor, grad_y: Tensor, orders: tuple[str, ...]) -> dict[str, int]:
    """Runs a step in each order; returns the number of programs of each kernel."""
    expected = run_like(layer, x, grad_y)
    found = []
    for order in orders:
        detector.order = order
        detector.launches.clear()
        twin = copy.deepcopy(layer)
        found.append(results(twin, x, grad_y))
        assert [name for name, _ in detector.launches] == (STEP if layer.training else EVALUATION) + BACKWARD
        if not isinstance(layer, ubn_zoo.UnifiedBatchNormAct2d):
            assert_results(twin, found[-1]["y"], found[-1]["grad_x"], expected, x.dtype)
    for outcome in found:
        for name, value in outcome.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, found[0][name]), name
    return dict(detector.launches)


def in_format(memory_format: torch.memory_format, *shape: int) -> tuple[Tensor, Tensor]:
    x, grad_y = (t.contiguous(memory_format=memory_format) for t in random_input(shape, dtype=torch.float32))
    return x, grad_y


class TestKernels:
    @pytest.mark.parametrize(
        "mode",
        ["open", *(pytest.param(mode, marks=pytest.mark.exhaustive) for mode in ("shut", "evaluation"))],
    )
    @both_formats
    def test_step(self, memory_format: torch.memory_format, mode: str, detector: Detector) -> None:
        layer = make_layer(9, gate=SHUT if mode == "shut" else OPEN).train(mode != "evaluation")
        programs = check(detector, layer, *in_format(memory_format, 2, 9, 4, 5), ("reversed", "random"))
        single = ("_finalize_kernel", "_similarity_kernel")
        assert all(count > 1 for name, count in programs.items() if name not in single)

    @both_formats
    def test_relu(self, memory_format: torch.memory_format, detector: Detector) -> None:
        layer = make_layer(3, cls=ubn_zoo.UnifiedBatchNormAct2d)
        check(detector, layer, *in_format(memory_format, 2, 3, 3, 4), ("reversed",))

    @pytest.mark.exhaustive
    @both_formats
    def test_split_images(self, memory_format: torch.memory_format, detector: Detector) -> None:
        """Several pieces per image, strips of rows, blocks of columns, and programs of the similarity."""
        x, grad_y = in_format(memory_format, 2, 2, 20, 66)
        for purpose in ("output", "sums", "gradient"):
            assert launching.tap_blocks(tuple(x.shape), memory_format == torch.channels_last, 3, purpose).pieces > 1
        programs = check(detector, make_layer(2), x, grad_y, tuple(ORDERS))
        assert programs["_similarity_kernel"] > 1

    @pytest.mark.exhaustive
    @both_formats
    def test_groups_of_samples(
        self, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch, detector: Detector
    ) -> None:
        monkeypatch.setattr(launching, "PROGRAMS", 1)
        launching.tap_blocks.cache_clear()
        try:
            assert launching.tap_blocks((9, 3, 3, 4), memory_format == torch.channels_last, 3, "sums").group > 1
            check(detector, make_layer(3), *in_format(memory_format, 9, 3, 3, 4), tuple(ORDERS))
        finally:
            launching.tap_blocks.cache_clear()

    @pytest.mark.parametrize("fed", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
    @both_formats
    def test_inference(self, memory_format: torch.memory_format, fed: bool, detector: Detector) -> None:
        model = nn.Sequential(nn.Conv2d(3, 9, 1), make_layer(9)).eval()
        norm = ubn_zoo.fuse(model)[1] if fed else ubn_zoo.fuse(model[1])
        x = in_format(memory_format, 2, 9, 4, 5)[0]
        outputs = []
        for detector.order in ORDERS:
            with torch.no_grad():
                outputs.append(norm(x))
        assert [name for name, _ in detector.launches] == EVALUATION * 3
        assert outputs[0].isfinite().all()
        assert all(torch.equal(y, outputs[0]) for y in outputs)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(
        ("dtype", "kernel_size"),
        [(torch.float32, 1), (torch.float32, 3), (torch.float32, 5), (torch.float64, 3), (torch.bfloat16, 3)],
        ids=str,
    )
    @pytest.mark.parametrize(
        "shape",
        [
            (2, 3, 1, 1),
            (2, 1, 7, 1),
            (2, 2, 1, 7),
            (17, 3, 4, 3),
            (2, 130, 3, 3),
            (2, 64, 2, 2),
            (3, 33, 6, 9),
            (130, 2, 2, 1),
            (2, 3, 20, 66),
            (2, 3, 5, 150),
        ],
        ids=str,
    )
    @both_formats
    def test_everything(
        self,
        memory_format: torch.memory_format,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kernel_size: int,
        detector: Detector,
    ) -> None:
        x, grad_y = (t.contiguous(memory_format=memory_format) for t in random_input(shape, dtype=dtype))
        layer = make_layer(shape[1], kernel_size=kernel_size, dtype=dtype)
        check(detector, layer, x, grad_y, ("reversed", "random"))
        check(detector, make_layer(shape[1], dtype=dtype, cls=ubn_zoo.UnifiedBatchNormAct2d), x, grad_y, ("forward",))


with pytest.MonkeyPatch.context() as patch:
    # Whether a function is interpreted is decided where it is defined.
    patch.setenv("TRITON_INTERPRET", "1")

    @triton.jit
    def _copy_kernel(source, target, n, read_limit, write_limit, shift, step, BLOCK: tl.constexpr):
        i = tl.program_id(0) * step + tl.arange(0, BLOCK)
        values = tl.load(source + i + shift, mask=i < read_limit, other=0.0)
        tl.store(target + i, values, mask=i < write_limit)

    @triton.jit
    def _prefix_kernel(total, n):
        i = tl.program_id(0)
        if i > 0:
            tl.store(total + i, tl.load(total + i - 1) + 1.0)


class TestDetector:
    """It finds the error of each broken kernel or launch, and none where there is none."""

    @staticmethod
    def copy(n: int = 10, programs: int = 3, step: int = 4, read: int = 10, write: int = 10, shift: int = 0) -> None:
        source, target = torch.ones(n), torch.empty(n)
        _copy_kernel[(programs,)](source, target, n, read, write, shift, step, BLOCK=4)
        assert torch.equal(source, target)

    @pytest.mark.parametrize("order", ORDERS)
    def test_sound_kernel(self, order: str, detector: Detector) -> None:
        detector.order = order
        self.copy()
        assert detector.launches == [("_copy_kernel", 3)]

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            ({"read": 11}, r"program 2 of 3, reads outside source, which has 10 elements: \[10\]"),
            ({"shift": -1}, r"program 0 of 3, reads outside source, which has 10 elements: \[-1\]"),
            ({"write": 12}, r"program 2 of 3, writes outside target, which has 10 elements: \[10, 11\]"),
            ({"write": 9}, r"leaves elements of target uninitialized: \[9\]"),
            ({"programs": 2}, r"leaves elements of target uninitialized: \[8, 9\]"),
            ({"step": 3}, r"program 1 of 3, writes what another program writes of target"),
        ],
        ids=str,
    )
    def test_broken_kernel(self, broken: dict[str, int], message: str, detector: Detector) -> None:
        with pytest.raises((KernelError, InterpreterError), match=message):
            self.copy(**broken)

    @pytest.mark.parametrize(
        ("order", "message"),
        [
            ("forward", "program 2 of 3, reads what another program writes to total"),
            ("reversed", "program 1 of 3, writes what another program reads of total"),
        ],
    )
    def test_order_matters(self, order: str, message: str, detector: Detector) -> None:
        detector.order = order
        with pytest.raises(InterpreterError, match=message):
            _prefix_kernel[(3,)](torch.zeros(3), 3)

    def test_uninitialized_memory(self, detector: Detector) -> None:
        with pytest.raises(InterpreterError, match="reads uninitialized elements of source"):
            _copy_kernel[(1,)](torch.empty(4), torch.empty(4), 4, 4, 4, 0, 4, BLOCK=4)

    @both_formats
    def test_broken_launch(
        self, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch, detector: Detector
    ) -> None:
        """The layer's own kernels, launched with too few programs, too few rows, and a vector that is too short."""
        layer, x = make_layer(3), in_format(memory_format, 2, 3, 5, 4)[0]
        parameters = (layer.weight, layer.bias, layer.center_weight, layer.scale_weight, layer.scale_bias)
        constants = statistics.instance_means(x), layer.running_mean, layer.running_var
        arguments = (*(None if p is None else p.detach() for p in parameters), 1e-5, False)
        with pytest.raises(InterpreterError, match=r"_affine_kernel.*reads outside var, which has 2 elements: \[2\]"):
            forward.affine(x, *constants[:2], constants[2][:2].clone(), *arguments)

        blocks = launching.tap_blocks(tuple(x.shape), memory_format == torch.channels_last, 3, "output")
        monkeypatch.setattr(forward, "tap_blocks", lambda *_: blocks._replace(span=4))
        with pytest.raises(KernelError, match="_affine_kernel.*leaves elements of output uninitialized"):
            forward.affine(x, *constants, *arguments)

        blocks = launching.statistics_blocks((1, 3, 5, 4), memory_format == torch.channels_last)
        monkeypatch.setattr(statistics, "statistics_blocks", lambda *_: blocks._replace(channels=1))
        monkeypatch.setattr(launching.Blocks, "channel_blocks", lambda *_: 2)
        with pytest.raises(KernelError, match="_moments_kernel.*leaves elements of means uninitialized"):
            statistics.instance_means(x)
