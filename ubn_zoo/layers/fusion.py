"""Models for inference: norms folded into the convolutions around them."""

import copy
import itertools
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from timm.layers import Conv2dSame, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ubn_zoo.utils.derived import Derived, derive

from . import internals
from .convert import BATCHNORMS
from .kernels import operators
from .tracing import feeding_convolutions, has_forward_hooks
from .ubn import UnifiedBatchNorm2d, UnifiedBatchNormAct2d

__all__ = ["InferenceNorm2d", "fuse"]

_VECTORS = ("slope", "shift", "center", "factor_slope", "factor_shift")
_REFUSAL = (
    "this model was created by ubn_zoo.fuse for inference only: its norms are folded into its convolutions. Train the "
    "original model and fuse it again"
)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float16 or tensor.dtype == torch.bfloat16


@register_notrace_module
class InferenceNorm2d(nn.Module):
    """The part of a norm that cannot be folded: it depends on the instance, or no convolution feeds it.

    With m = mean_hw(input) it computes

        x = slope * input + shift + center * m
        y = sigmoid(factor_slope * m + factor_shift) * (weight * x + bias)

    where the product with ``weight`` is a depthwise convolution with zero padding, and returns the activation of y.
    Terms that are None are left out. On a GPU, without gradients, the input is read once for m and once for the other
    terms.

    Args:
        slope: (C,) factor of the input; None for 1.
        shift: (C,), None for 0.
        center: (C,), None for 0.
        weight: (C, 1, k, k) depthwise kernel; None if it has a single tap, which the other constants include.
        bias: (C,), goes with ``weight``.
        factor_slope: (C,), None for no factor.
        factor_shift: (C,), goes with ``factor_slope``.
        overwrite: Whether the input may be overwritten, because nothing else uses it.
        activation: "relu", or None for no activation.

    Raises:
        ValueError: An unknown activation.
    """

    slope: Optional[Tensor]
    shift: Optional[Tensor]
    center: Optional[Tensor]
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    factor_slope: Optional[Tensor]
    factor_shift: Optional[Tensor]
    activation: Optional[str]

    def __init__(
        self,
        slope: Optional[Tensor],
        shift: Optional[Tensor],
        center: Optional[Tensor],
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        factor_slope: Optional[Tensor],
        factor_shift: Optional[Tensor],
        overwrite: bool,
        activation: Optional[str] = None,
    ) -> None:
        super().__init__()
        if activation not in (None, "relu"):
            raise ValueError(f"activation is {activation!r}, valid are 'relu' and None; apply others after the norm")
        self.register_buffer("slope", slope)
        self.register_buffer("shift", shift)
        self.register_buffer("center", center)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("factor_slope", factor_slope)
        self.register_buffer("factor_shift", factor_shift)
        self.overwrite = overwrite
        # Without any of these, the output is the input.
        present = [tensor is not None for tensor in (slope, shift, center, weight, factor_slope)]
        self._owns_output = overwrite or any(present)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W), keeping its dtype and memory format."""
        if torch.jit.is_scripting():
            return self._compute(input)
        return self._guarded(input)

    @torch.jit.unused
    def _guarded(self, input: Tensor) -> Tensor:
        if internals.is_proxy(input):
            return internals.leaf_call(self, input)
        compute = self._through_kernels if self._uses_kernels(input) else self._compute
        if internals.autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):
                return compute(input)
        return compute(input)

    @torch.jit.unused
    def _uses_kernels(self, input: Tensor) -> bool:
        # The operator has no gradient, and no rules for the transforms of torch.func.
        if internals.is_capturing() or not operators.usable(input, 1 if self.weight is None else self.weight.shape[2]):
            return False
        tensors = (input, *self.buffers(recurse=False))
        return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))

    @torch.jit.unused
    def _through_kernels(self, input: Tensor) -> Tensor:
        return operators.folded_affine(
            input,
            self.slope,
            self.shift,
            self.center,
            self.weight,
            self.bias,
            self.factor_slope,
            self.factor_shift,
            self.activation is not None,
        )

    def _compute(self, input: Tensor) -> Tensor:
        output = self._norm(input)
        return output if self.activation is None else F.relu(output, inplace=self._owns_output)

    def _norm(self, input: Tensor) -> Tensor:
        # Local variables, because TorchScript refines only those when they are compared with None.
        slope, offset, center, weight, bias = self.slope, self.shift, self.center, self.weight, self.bias
        factor_slope, factor_shift = self.factor_slope, self.factor_shift
        factor: Optional[Tensor] = None
        if center is not None or factor_slope is not None:
            mean = input.mean((2, 3), dtype=torch.float32) if _is_half(input) else input.mean((2, 3))
            if center is not None and offset is not None:
                offset = torch.addcmul(offset, center, mean)
            if factor_slope is not None and factor_shift is not None:
                factor = torch.addcmul(factor_shift, factor_slope, mean).sigmoid()
        if weight is None:
            # With one tap, slope and offset include the factor, which then needs no separate pass.
            if factor is not None:
                slope = factor if slope is None else factor * slope
                offset = None if offset is None else factor * offset
            return self._scale(input, slope, offset)
        output = F.conv2d(
            self._scale(input, slope, offset),
            weight.to(input.dtype),
            None if bias is None else bias.to(input.dtype),
            padding=weight.shape[2] // 2,
            groups=weight.shape[0],
        )
        return output if factor is None else output.mul_(factor[:, :, None, None].to(output.dtype))

    def _scale(self, input: Tensor, slope: Optional[Tensor], offset: Optional[Tensor]) -> Tensor:
        if slope is not None and offset is not None and _is_half(input):
            # Rounds once after product and sum: rounding in between would lose small deviations from a large mean.
            return torch.addcmul(offset[..., None, None], input, slope[..., None, None]).to(input.dtype)
        output, mine = input, self.overwrite
        if slope is not None:
            factors = slope[..., None, None].to(input.dtype)
            output = output.mul_(factors) if mine else output * factors
            mine = True
        if offset is not None:
            terms = offset[..., None, None].to(input.dtype)
            output = output.add_(terms) if mine else output + terms
        return output

    def extra_repr(self) -> str:
        present = [name for name, tensor in self.named_buffers(recurse=False) if tensor is not None]
        text = f"{', '.join(present)}, overwrite={self.overwrite}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: self._buffers[name] for name in _VECTORS}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and _is_half(after):
                # They are as large as the features' mean and are combined with float32 statistics, as in the layer.
                self._buffers[name] = before.to(after.device)
        return self


class _NormAct(nn.Module):
    """The replacement of a norm with activation, followed by that norm's drop layer and activation."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(self.norm(input)))


class _Constants(NamedTuple):
    """A norm in evaluation, in float64 on the CPU: f * (kernel * ((x - mean + center * mean_hw(x)) * scale) + bias).

    The factor is f = sigmoid(scale_weight * mean_hw(x_hat) + scale_bias), where x_hat is the input of the kernel, or 1.
    A constant factor is already part of ``kernel`` and ``bias``, and zero borders are trimmed from the kernel.
    """

    mean: Tensor
    scale: Tensor
    kernel: Tensor  # (C, 1, k, k)
    bias: Tensor
    center: Optional[Tensor]
    scale_weight: Optional[Tensor]
    scale_bias: Optional[Tensor]


def _constants(norm: Any) -> _Constants:
    def exact(tensor: Optional[Tensor], default: float) -> Tensor:
        if tensor is None:
            return torch.full((norm.num_features,), default, dtype=torch.float64, device="cpu")
        return tensor.detach().to("cpu", torch.float64, copy=True)

    kernel, bias = exact(norm.weight, 1.0), exact(norm.bias, 0.0)
    if kernel.dim() == 1:
        kernel = kernel[:, None, None, None]
    center = scale_weight = scale_bias = None
    if isinstance(norm, UnifiedBatchNorm2d):
        if norm.center_weight is not None and bool(norm.center_weight.any()):
            center = exact(norm.center_weight, 0.0)
        if norm.scale_weight is not None:
            scale_weight, scale_bias = exact(norm.scale_weight, 0.0), exact(norm.scale_bias, 0.0)
            if not bool(scale_weight.any()):
                factor = scale_bias.sigmoid()
                kernel, bias = kernel * factor[:, None, None, None], bias * factor
                scale_weight = scale_bias = None
    while kernel.shape[2] > 1 and bool((F.pad(kernel[:, :, 1:-1, 1:-1], (1, 1, 1, 1)) == kernel).all()):
        kernel = kernel[:, :, 1:-1, 1:-1].contiguous()
    scale = (exact(norm.running_var, 1.0) + norm.eps).rsqrt()
    return _Constants(exact(norm.running_mean, 0.0), scale, kernel, bias, center, scale_weight, scale_bias)


def _scaled_convolution(conv: Any, factor: Tensor, bias: Tensor) -> nn.Module:
    """A copy of a convolution whose output is multiplied by ``factor`` per channel, then added to ``bias``."""
    weight = conv.weight.detach()
    if conv.bias is not None:
        bias = bias + factor * conv.bias.detach().to("cpu", torch.float64)
    scaled = weight.to("cpu", torch.float64) * factor[:, None, None, None]
    copied: Any = copy.deepcopy(conv, {id(conv.weight): nn.Parameter(scaled.to(weight), requires_grad=False)})
    copied.bias = nn.Parameter(bias.to(weight), requires_grad=False)
    return copied


def _depthwise_convolution(constants: _Constants, like: Tensor) -> nn.Module:
    channels, _, size, _ = constants.kernel.shape
    conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, device="meta")
    conv.weight = nn.Parameter(constants.kernel.to(like), requires_grad=False)
    conv.bias = nn.Parameter(constants.bias.to(like), requires_grad=False)
    return conv


def _inference_norm(constants: _Constants, norm: Any, folded: bool) -> nn.Module:
    """A norm with scale and mean folded into the convolution before it, or a norm of its original input."""
    mean, scale, kernel, bias, center, scale_weight, scale_bias = constants
    # x_hat = slope * input + shift + centering * mean_hw(input)
    if folded:
        slope = torch.ones_like(scale)
        centering = torch.zeros_like(scale) if center is None else center
        shift = centering * scale * mean
    else:
        slope = scale
        centering = torch.zeros_like(scale) if center is None else center * scale
        shift = -scale * mean
    factor_slope = None if scale_weight is None else scale_weight * (slope + centering)
    factor_shift = None if scale_weight is None or scale_bias is None else scale_bias + scale_weight * shift

    one_tap = kernel.shape[2] == 1
    if one_tap:
        gain = kernel[:, 0, 0, 0]
        slope, shift, centering = gain * slope, gain * shift + bias, gain * centering
    shifted = one_tap or not folded or center is not None

    def vector(tensor: Optional[Tensor], present: bool = True) -> Optional[Tensor]:
        return tensor.to(norm.running_var) if tensor is not None and present else None

    def affine(tensor: Tensor) -> Optional[Tensor]:
        return None if one_tap else tensor.to(norm.running_var if norm.weight is None else norm.weight.detach())

    return InferenceNorm2d(
        vector(slope, one_tap or not folded),
        vector(shift, shifted),
        vector(centering, center is not None),
        affine(kernel),
        affine(bias),
        vector(factor_slope),
        vector(factor_shift),
        overwrite=folded,
    ).eval()


def _replacements(norm: Any, conv: Optional[nn.Module]) -> Tuple[nn.Module, Optional[nn.Module]]:
    """The replacements of a norm and of the convolution that feeds it, if there is one."""
    constants = _constants(norm)
    mean, scale = constants.mean, constants.scale
    constant = constants.center is None and constants.scale_weight is None
    replaced: nn.Module
    scaled: Any = None
    if conv is None:
        replaced = _inference_norm(constants, norm, folded=False)
    elif constant and constants.kernel.shape[2] == 1:
        gain = constants.kernel[:, 0, 0, 0] * scale
        replaced, scaled = nn.Identity(), _scaled_convolution(conv, gain, constants.bias - gain * mean)
    else:
        # The mean folds into the convolution's bias, not behind the kernel, which pads normalized features with zeros.
        scaled = _scaled_convolution(conv, scale, -scale * mean)
        if constant:
            replaced = _depthwise_convolution(constants, scaled.weight.detach())
        else:
            replaced = _inference_norm(constants, norm, folded=True)
    if hasattr(norm, "act"):
        drop, act = copy.deepcopy(norm.drop), copy.deepcopy(norm.act)
        if isinstance(replaced, InferenceNorm2d) and norm.only_relu():
            # An identity keeps the activation's name, because feature extractors find its output by name.
            replaced.activation, act = "relu", nn.Identity()
        replaced = _NormAct(replaced, drop, act)
    return replaced.eval(), scaled


def _is_convolution(module: nn.Module) -> bool:
    # Subclasses may standardize their weights, for example; these classes apply them unchanged.
    return type(module) in (nn.Conv2d, Conv2dSame)


def _is_norm(module: nn.Module) -> bool:
    known = (UnifiedBatchNorm2d, UnifiedBatchNormAct2d, *BATCHNORMS)
    forward = getattr(type(module), "forward", None)
    return any(forward is kind.forward for kind in known) and module.running_mean is not None


class _InferenceModel(Derived):
    """Mixin of fused models."""

    prefix = "Fused"

    def train(self, mode: bool = True) -> "_InferenceModel":
        if mode:
            raise RuntimeError(_REFUSAL)
        return super().train(mode)


@torch.inference_mode(False)
def fuse(model: nn.Module, example_inputs: Optional[Any] = None) -> nn.Module:
    """Folds the norms of a model into its convolutions, for inference; the result computes the same function.

    A norm in evaluation is f * (K * x_hat + bias) with x_hat = (x + w mean_hw(x) - mean) / sqrt(var + eps) and
    f = sigmoid(u mean_hw(x_hat) + v), where K is a depthwise kernel. If only the norm uses the output of a convolution:

    - 1 / sqrt(var + eps) and the mean always fold into the convolution's weight and bias. The mean has to be
      subtracted before the kernel, which pads the normalized features with zeros; afterwards the shift would differ at
      the borders.
    - A constant calibration (w = 0, u = 0, as after conversion from BatchNorm, or switched off) folds into K and bias.
      A depthwise convolution remains; with a single tap nothing does, as with BatchNorm.
    - A trained w or u depends on the instance and cannot be folded. The instance means (one read of the features) and
      the factor f remain; w also needs an in-place sum before the kernel. With a single tap, f is part of the scale.

    A plain ReLU that follows the norm within the same layer becomes part of the remainder.

    A converted model then costs as much as a folded BatchNorm model. A trained one costs, per norm, a depthwise
    convolution, one read and one or two in-place passes; with the kernels, on a GPU, one read and one pass. Norms that
    no convolution feeds (in pre-activation blocks), or whose convolution's output has other consumers, are computed
    with precomputed constants. Plain ``BatchNorm2d`` folds too. Norms without running statistics, with forward hooks or
    with their own forward stay unchanged, and so do convolutions of classes other than ``Conv2d``.

    To find the convolution that feeds a norm, a copy of the model runs once, and no other operation may use the
    convolution's output (:func:`ubn_zoo.layers.tracing.feeding_convolutions`). Without ``example_inputs`` that copy is
    on the "meta" device, where a run costs nothing. timm's ``forward_intermediates`` is traced too; other methods of a
    model must use its layers as ``forward`` does.

    Constants are computed in float64 and rounded once to the dtype of the tensor they fold into. Outputs differ by
    rounding only. In float64 they agree to 1e-9 of the largest output on every architecture of the zoo with random
    parameters (measured: 4e-11). In float32 every folded weight has one more rounding error (6e-8 of it): outputs of
    converted models agree to 2e-6 of the largest. Outputs of trained models differ about as much as the unfused float32
    model differs from its float64 version. In bfloat16 the additional rounding error is 4e-3 per weight.

    Args:
        model: A model in evaluation mode. Not changed, and the result shares no memory with it.
        example_inputs: A tensor or a tuple of arguments to call the model with, for models that do not take one image
            of timm's configured (or 224 by 224) size, or that cannot run on the "meta" device. Used for one run of a
            copy of the model.

    Returns:
        A model of a class derived from the model's, with parameters that take no gradients; compilers and exporters
        accept it as they accept the original. ``train()`` raises RuntimeError. Its ``state_dict`` does not load into
        the
        original: keep that for training.

    Raises:
        TypeError: A compiled, scripted or data-parallel model: fuse the original model.
        ValueError: The model is in training mode, has no norm that can be fused, has parameters without values (on the
            "meta" device), or cannot be run without ``example_inputs``.
    """
    wrappers = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise TypeError(f"cannot fuse a {type(model).__name__}; fuse the original model")
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError(f"{type(model).__name__} is on the 'meta' device, without values to fold; load weights first")
    found = {name: module for name, module in model.named_modules() if _is_norm(module)}
    for name, module in {"it": model, **found}.items():
        if module.training:
            raise ValueError(f"{type(model).__name__} is in training mode ({name or 'it'} is); call its eval() first")

    norms = {module for module in found.values() if not has_forward_hooks(module)}
    inputs = example_inputs
    if inputs is not None and not isinstance(inputs, tuple):
        inputs = (inputs,)
    pairs = feeding_convolutions(model, norms, _is_convolution, inputs) if norms else {}
    memo: Dict[int, Any] = {}
    for norm in norms:
        conv = pairs.get(norm)
        # A BatchNorm without a convolution to fold into gains nothing.
        if conv is None and not isinstance(norm, UnifiedBatchNorm2d):
            continue
        replaced, scaled = _replacements(norm, conv)
        memo[id(norm)] = replaced
        if conv is not None:
            memo[id(conv)] = scaled
    if not memo:
        raise ValueError(
            f"found no norm to fuse in {type(model).__name__}: neither a UBN layer with running statistics nor a "
            "BatchNorm2d that a Conv2d feeds"
        )
    result = copy.deepcopy(model, memo).requires_grad_(False)
    if result.training:
        # A copied graph of torchvision's feature extractors is in training mode.
        result.eval()
    result.__class__ = derive(_InferenceModel, type(result))
    return result
