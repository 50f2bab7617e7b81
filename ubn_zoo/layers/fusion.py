"""Models for inference: norms folded into the convolutions around them."""

import copy
import itertools
import weakref
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Type

import torch
from timm.layers import Conv2dSame, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from . import internals
from .convert import BATCHNORMS
from .kernels import operators
from .tracing import feeding_convolutions, has_forward_hooks
from .ubn import UnifiedBatchNorm2d, UnifiedBatchNormAct2d

__all__ = ["InferenceNorm2d", "fuse"]

_VECTORS = ("slope", "shift", "center", "factor_slope", "factor_shift")
_REFUSAL = (
    "this model was made by ubn_zoo.fuse, for inference only: its norms are folded into its convolutions. Train the "
    "model that it was made of, and fuse that again"
)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float16 or tensor.dtype == torch.bfloat16


@register_notrace_module
class InferenceNorm2d(nn.Module):
    """What is left of a norm whose result depends on each instance, or that no convolution precedes.

    With m = mean_hw(input) it computes

        x = slope * input + shift + center * m
        y = sigmoid(factor_slope * m + factor_shift) * (weight * x + bias)

    where the second ``*`` is a depthwise convolution with zero padding, and the activation of y; whatever is None is
    left out. On a GPU, where no gradient is asked for, that is one reading of the input for m and one for all the rest.

    Args:
        slope: (C,) factor of the input, None for 1.
        shift: (C,), None for 0.
        center: (C,), None for 0.
        weight: (C, 1, k, k) depthwise kernel, None where its one tap is part of the others.
        bias: (C,), goes with ``weight``.
        factor_slope: (C,), None for no factor.
        factor_shift: (C,), goes with ``factor_slope``.
        overwrite: Whether the input is nobody else's and may be overwritten.
        activation: "relu", or None for none.

    Raises:
        ValueError: Another activation.
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
            raise ValueError(f"activation is {activation!r}, valid are 'relu' and None; put any other behind the norm")
        self.register_buffer("slope", slope)
        self.register_buffer("shift", shift)
        self.register_buffer("center", center)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("factor_slope", factor_slope)
        self.register_buffer("factor_shift", factor_shift)
        self.overwrite = overwrite
        # Without any of these the output is the input.
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
        # Locals, because scripted code tells what is None by them alone.
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
            # With one tap the factor is a part of slope and offset, and costs no pass of its own.
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
            # The product and the sum are rounded once: a large mean would otherwise leave nothing of small deviations.
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
                # They are of the order of the features' mean and meet statistics in float32, as in the layer.
                self._buffers[name] = before.to(after.device)
        return self


class _NormAct(nn.Module):
    """Whatever took the place of a norm, followed by what followed it there."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(self.norm(input)))


class _Constants(NamedTuple):
    """A norm in evaluation, in float64 on the CPU: f * (kernel * ((x - mean + center * mean_hw(x)) * scale) + bias).

    Its factor is f = sigmoid(scale_weight * mean_hw(x_hat) + scale_bias), x_hat what the kernel is applied to, or 1.
    What is constant is part of ``kernel`` and ``bias`` already, and the kernel has no border of zeros.
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
    """A norm for what a convolution returns with scale and mean folded into it, or for the norm's own input."""
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
    """What takes the places of a norm and of the convolution that feeds it, if one does."""
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
        # The mean goes into the convolution's bias and not behind the kernel, which pads what is normalized with zeros.
        scaled = _scaled_convolution(conv, scale, -scale * mean)
        if constant:
            replaced = _depthwise_convolution(constants, scaled.weight.detach())
        else:
            replaced = _inference_norm(constants, norm, folded=True)
    if hasattr(norm, "act"):
        drop, act = copy.deepcopy(norm.drop), copy.deepcopy(norm.act)
        if isinstance(replaced, InferenceNorm2d) and norm.only_relu():
            # The activation's place is kept, for those who look for its output by its name.
            replaced.activation, act = "relu", nn.Identity()
        replaced = _NormAct(replaced, drop, act)
    return replaced.eval(), scaled


def _is_convolution(module: nn.Module) -> bool:
    # Subclasses may standardize their weights, or do anything else; these are known to apply them as they are.
    return type(module) in (nn.Conv2d, Conv2dSame)


def _is_norm(module: nn.Module) -> bool:
    known = (UnifiedBatchNorm2d, UnifiedBatchNormAct2d, *BATCHNORMS)
    forward = getattr(type(module), "forward", None)
    return any(forward is kind.forward for kind in known) and module.running_mean is not None


class _InferenceModel(nn.Module):
    """What a model gains by :func:`fuse`; the class of the result derives from this and from the model's class."""

    _base: Type[nn.Module]

    def train(self, mode: bool = True) -> "_InferenceModel":
        if mode:
            raise RuntimeError(_REFUSAL)
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly and has no name to be found by; the model's own may be of that kind, too.
        base = type(self)._base
        return _new_inference_model, base.__new__(base).__reduce_ex__(protocol)[:2], vars(self)


# A class lives as long as models of it; traced graphs have a class each.
_classes: "weakref.WeakValueDictionary[Type[nn.Module], Type[nn.Module]]" = weakref.WeakValueDictionary()


def _inference_class(base: Type[nn.Module]) -> Type[nn.Module]:
    cls = _classes.get(base)
    if cls is None:
        members = {"__module__": __name__, "__doc__": base.__doc__, "_base": base}
        cls = _classes.setdefault(base, type(f"Fused{base.__name__}", (_InferenceModel, base), members))
    return cls


def _new_inference_model(make: Callable[..., nn.Module], arguments: Tuple[Any, ...]) -> nn.Module:
    cls = _inference_class(type(make(*arguments)))
    return cls.__new__(cls)


@torch.inference_mode(False)
def fuse(model: nn.Module, example_inputs: Optional[Any] = None) -> nn.Module:
    """Makes a model for inference that computes the same function with its norms folded into its convolutions.

    A norm in evaluation is f * (K * x_hat + bias) with x_hat = (x + w mean_hw(x) - mean) / sqrt(var + eps) and
    f = sigmoid(u mean_hw(x_hat) + v), K a depthwise kernel. Where a convolution feeds it and nothing else:

    - 1 / sqrt(var + eps) and the mean fold into the convolution's weight and bias, always. The mean has to go before
      the kernel, which pads the normalized features with zeros: behind it the shift would differ at the borders.
    - A constant calibration (w = 0, u = 0, as after conversion from BatchNorm, or switched off) folds into K and bias.
      What is left is a depthwise convolution, and nothing at all where K has one tap: that folds as BatchNorm does.
    - A trained w or u depends on the instance and cannot fold. The mean per instance stays, one reading of the
      features, and the factor f; with w also a sum in place before the kernel. With one tap the factor is part of it.

    A plain ReLU that follows a norm inside of the same layer becomes a part of what is left.

    So a converted model costs what BatchNorm's costs when it is folded, and a trained one per norm: a depthwise
    convolution, a reading and one or two sweeps in place; with the layer's kernels, on a GPU, a reading and one sweep
    for all the rest. A norm that no convolution feeds (of pre-activation blocks), or one whose convolution's output has
    other readers, is computed with constants prepared. Plain ``BatchNorm2d`` folds too. Norms without running
    statistics, with forward hooks or with a forward of their own stay as they are, and so do convolutions of other
    classes than ``Conv2d``.

    Which convolution feeds which norm is seen in a run of a copy of the model, in which no operation may take the
    convolution's output but the norm (:func:`ubn_zoo.layers.tracing.feeding_convolutions`). Without
    ``example_inputs`` that copy has no values and costs nothing. timm's ``forward_intermediates`` is looked at in the
    same way; other methods of a model have to use its layers as its ``forward`` does.

    Constants are computed in float64 and rounded once to the dtype of what they fold into. The result is the same
    function but for rounding: in float64 to 1e-9 of the largest output on every architecture of the zoo, everything in
    its layers random (seen: 4e-11). In float32 each folded weight is off by one rounding more (6e-8 of it), and the
    outputs by what a network makes of that, which is what it makes of all its other roundings, too: 2e-6 of the largest
    output for converted models, and for trained ones about the distance of the unfused float32 model from itself in
    float64. In bfloat16 the extra rounding is one of 4e-3 per weight.

    Args:
        model: In evaluation mode. Not changed, and the result shares no memory with it.
        example_inputs: What the model is called with, one tensor or a tuple of arguments, for models that do not take
            one image of timm's configured (or 224 by 224) size, or cannot run on the "meta" device. Used for one run of
            a copy of the model.

    Returns:
        A model of a class derived from the model's, without gradients for parameters and fit for the same compilers
        and exporters. ``train()`` raises RuntimeError. ``state_dict`` is its own: keep the original for training.

    Raises:
        TypeError: A compiled, scripted or data-parallel model: fuse what it was made of.
        ValueError: The model is in training mode, has no norm that can be fused, has parameters without values (on the
            "meta" device), or cannot be run without ``example_inputs``.
    """
    wrappers = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise TypeError(f"cannot fuse a {type(model).__name__}; fuse the model that it was made of")
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
        # Without a convolution to fold into, BatchNorm is as fast as it gets.
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
        # A graph of torchvision's extractors comes out of a copy in training mode.
        result.eval()
    result.__class__ = _inference_class(type(result))
    return result
