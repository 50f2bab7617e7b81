"""Lower bounds of the cost of norm layers: memory traffic and, in plain torch, a depthwise convolution.

In training BatchNorm reads its input twice and writes its output once, then reads the input and the output's gradient
twice each and writes the input's gradient once: 8 times the input's bytes. UBN also reads 16 samples, which are ignored
here. In evaluation BatchNorm and BNET read and write once; RBN and UBN read once more, for the means of each instance.
In a fused model BatchNorm disappears, and UBN costs the same as in evaluation.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ubn_zoo.layers import VARIANTS, UnifiedBatchNorm2d
from ubn_zoo.layers.autograd import chunks, depthwise, depthwise_kernel_grad

from .turns import Timing, milliseconds

__all__ = ["WITH_CONVOLUTION", "NormCosts", "convolution_step", "copy_step", "norm_costs", "traffic"]

WITH_CONVOLUTION = (*(kind for kind, variant in VARIANTS.items() if variant.depthwise), "naive")
_REPEATS = 5
_GPU_COPIES = 20


def traffic(kind: str, mode: str) -> int:
    """Least number of bytes that a norm layer moves, in multiples of its input's bytes.

    Args:
        kind: Kind of the layer.
        mode: Mode of the run, of models or layers.
    """
    if mode in ("train", "layer"):
        return 8
    if mode == "folded" or (mode == "fused" and kind == "bn"):
        return 0
    return 2 if kind in VARIANTS and not VARIANTS[kind].calibrated else 3


def copy_step(features: Tensor) -> tuple[Callable[[], object], int]:
    """A step that copies the features, which moves twice their bytes; floors are derived from its bandwidth.

    Args:
        features: A tensor of any shape.

    Returns:
        The step, and how many copies it makes: several on a GPU, to hide the cost of launches.
    """
    source, target = features.detach(), torch.empty_like(features)
    copies = _GPU_COPIES if features.device.type == "cuda" else 1

    def step() -> None:
        for _ in range(copies):
            target.copy_(source)

    return step, copies


def convolution_step(features: Tensor, grad: Tensor | None) -> Callable[[], object]:
    """The depthwise 3x3 convolutions of a UBN layer alone, computed as the layer does; the results are dropped.

    Args:
        features: (N, C, H, W).
        grad: Gradient of the output; None for no backward.
    """
    features = features.detach()
    channels = features.shape[1]
    kernel = torch.randn(channels, 1, 3, 3, device=features.device, dtype=features.dtype)
    bias = torch.zeros(channels, device=features.device, dtype=features.dtype)

    flipped = kernel.flip(2, 3)

    @torch.no_grad()
    def step() -> None:
        for chunk in chunks(features):
            depthwise(features[chunk], kernel, bias)
        if grad is not None:
            for chunk in chunks(features):
                depthwise_kernel_grad(grad[chunk], features[chunk], kernel)
                depthwise(grad[chunk], flipped)

    return step


@dataclasses.dataclass(frozen=True, slots=True)
class NormCosts:
    """Lower bounds of the cost of a model's norm layers together, in milliseconds.

    Attributes:
        copy: Time to copy the input of each.
        convolution: Time of their depthwise convolutions, in training including backward.
    """

    copy: float
    convolution: float

    def of(self, timing: Timing, base: Timing, mode: str) -> Timing:
        """Fill in a timing's floor, convolutions and limit.

        Args:
            timing: The timing of a model with these layers.
            base: The timing of the first model of its run.
            mode: Mode of the timing; "eval" for the unfused model.
        """
        floor = self.copy * traffic(timing.kind, mode) / 2
        if timing.kind not in WITH_CONVOLUTION or mode == "folded":
            return dataclasses.replace(timing, floor=floor)
        limit = (base.median + self.convolution) / base.median
        return dataclasses.replace(timing, floor=floor, convolution=self.convolution, limit=limit)


def norm_costs(model: nn.Module, forward: Callable[[], object], device: torch.device, *, training: bool) -> NormCosts:
    """Measure lower bounds of the cost of a model's norm layers, on features of the shapes that they receive.

    Args:
        model: A model with BatchNorm2d or UBN layers.
        forward: Runs the model once.
        device: Device of the model.
        training: Whether to include backward.
    """
    inputs: collections.Counter[tuple[torch.Size, torch.dtype, bool]] = collections.Counter()

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        (features,) = args
        inputs[features.shape, features.dtype, features.is_contiguous()] += 1

    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, UnifiedBatchNorm2d))]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    sums = [0.0, 0.0]
    for (shape, dtype, contiguous), count in inputs.items():
        layout = torch.contiguous_format if contiguous else torch.channels_last
        features = torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout)
        grad = torch.randn_like(features) if training else None
        steps = copy_step(features), (convolution_step(features, grad), 1)
        for index, (step, repeats) in enumerate(steps):
            found = [milliseconds(step, device) for _ in range(1 + _REPEATS)][1:]
            sums[index] += count * statistics.median(found) / repeats
    return NormCosts(*sums)
