"""The Unified Batch Normalization modules: parameters, buffers, and the choice of an implementation."""

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple, Type, Union

import torch
from timm.layers import create_act_layer, register_notrace_module
from torch import Tensor, nn

from . import autograd, distributed, functional, internals, overlooked, recompute
from .kernels import operators
from .parameters import CALIBRATIONS, Parameters, State
from .state import affine_gain, identity_kernel, upgrade_layer_state

__all__ = ["MAX_KERNEL_SIZE", "UnifiedBatchNorm2d", "UnifiedBatchNormAct2d"]

MAX_KERNEL_SIZE = 31  # A larger kernel would mostly cover padding on the feature maps of image models.

_STATISTICS = ("running_mean", "running_var", "feature_similarity")


def has_no_hooks(module: nn.Module) -> bool:
    """Whether no hook observes a module's inputs and outputs, so that its call can be skipped."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


@register_notrace_module
class UnifiedBatchNorm2d(nn.Module):
    """Unified Batch Normalization over (N, C, H, W) inputs, a drop-in replacement for ``torch.nn.BatchNorm2d``.

    A running cosine similarity between samples gates the statistics. While features are condensed (similarity above
    ``threshold``), the layer normalizes with batch statistics and updates the running ones. Otherwise it normalizes
    with the running statistics and leaves them unchanged. Centering and scaling are calibrated per instance, and the
    affine is a depthwise convolution. Source: Wang et al., arXiv 2311.15993; the equations are in
    :mod:`ubn_zoo.layers.functional`.

    With parts disabled, this layer is RBN, BNET or BatchNorm: see :data:`ubn_zoo.layers.variants.VARIANTS`.

    Statistics are computed and stored in float32 (float64 for float64 modules), also when the module is cast to half
    precision. The layer never synchronizes with the device.

    A training step with non-finite statistics, such as a float16 overflow that loss scaling skips, changes no buffer,
    and ``num_batches_tracked`` does not count it; the gate uses the last finite similarity. The layer cannot repair
    buffers that are already NaN, and ``load_state_dict`` does not check for them; this package's functions that load
    weights reject non-finite values.

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        affine: Whether there is a depthwise affine (``weight`` and ``bias``).
        track_running_stats: Whether the layer keeps running statistics. Without them it always normalizes with batch
            statistics, in evaluation too, and has no gate.
        threshold: Threshold tau of the gate on ``feature_similarity``; None for no gate (always batch statistics).
        similarity_momentum: Weight of a batch in ``feature_similarity``.
        similarity_samples: Number of leading samples of a batch to compare.
        kernel_size: Taps per side of the depthwise affine, odd and at most 31.
        kernel_init: "identity" starts as BatchNorm; "kaiming" draws the depthwise kernel from
            N(0, 2 / (kernel_size^2 C)), as the authors do.
        center_calibration: Whether there is a centering calibration (``center_weight``).
        scale_calibration: Whether there is a scaling calibration (``scale_weight``, ``scale_bias``).
        depthwise_affine: False for BatchNorm's affine, one tap per channel whatever ``kernel_size``.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters.

    Attributes:
        weight: (C, 1, k, k) depthwise kernel.
        bias: (C,), starts at 0.
        center_weight: (C,), starts at 0.
        scale_weight: (C,), starts at 0.
        scale_bias: (C,), starts at 1.
        running_mean: (C,) buffer, starts at 0.
        running_var: (C,) buffer, unbiased, starts at 1.
        num_batches_tracked: Integer scalar buffer, the training steps whose statistics were finite.
        feature_similarity: Scalar buffer, running similarity r between samples, starts at 1.

    Raises:
        ValueError: A setting out of range; an input that is not (N, num_features, H, W); a training step on a single
            value per channel.
    """

    if TYPE_CHECKING:  # torch.jit.script would take annotated buffers for plain attributes
        weight: Optional[nn.Parameter]
        bias: Optional[nn.Parameter]
        center_weight: Optional[nn.Parameter]
        scale_weight: Optional[nn.Parameter]
        scale_bias: Optional[nn.Parameter]
        running_mean: Optional[Tensor]
        running_var: Optional[Tensor]
        num_batches_tracked: Optional[Tensor]
        feature_similarity: Optional[Tensor]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        threshold: Optional[float] = 0.15,
        similarity_momentum: float = 0.1,
        similarity_samples: int = 16,
        kernel_size: int = 3,
        kernel_init: str = "identity",
        center_calibration: bool = True,
        scale_calibration: bool = True,
        depthwise_affine: bool = True,
        device: Optional[Union[torch.device, str]] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}, valid are positive channel counts")
        if not isinstance(kernel_size, int) or not 1 <= kernel_size <= MAX_KERNEL_SIZE or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size is {kernel_size!r}, valid are odd sizes from 1 to {MAX_KERNEL_SIZE}: the affine keeps H "
                "and W"
            )
        if kernel_init not in ("identity", "kaiming"):
            raise ValueError(f"kernel_init is {kernel_init!r}, valid are 'identity' (as BatchNorm) and 'kaiming'")
        if similarity_samples < 2:
            raise ValueError(
                f"similarity_samples is {similarity_samples}, valid are 2 or more: they are compared in pairs"
            )
        if threshold is not None and math.isnan(threshold):
            raise ValueError("threshold is NaN, valid are numbers (cosines lie between -1 and 1) and None for no gate")
        if not 0 <= similarity_momentum <= 1:
            raise ValueError(f"similarity_momentum is {similarity_momentum}, valid is the range from 0 to 1")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.threshold = threshold
        self.similarity_momentum = similarity_momentum
        self.similarity_samples = similarity_samples
        self.kernel_size = kernel_size if depthwise_affine else 1
        self.kernel_init = kernel_init
        self.frozen = False
        self._sync: Optional[distributed.SyncGroup] = None
        self._records = recompute.Records()
        # If True, the layer uses the plain equations, for comparison with the other implementations.
        self._equations_only = False
        # `requires_grad` of each parameter before freezing.
        self._trainable: Tuple[bool, ...] = ()

        def parameter(present: bool, *shape: int) -> Optional[nn.Parameter]:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if present else None

        self.weight = parameter(affine, num_features, 1, self.kernel_size, self.kernel_size)
        self.bias = parameter(affine, num_features)
        self.center_weight = parameter(center_calibration, num_features)
        self.scale_weight = parameter(scale_calibration, num_features)
        self.scale_bias = parameter(scale_calibration, num_features)
        statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        track = track_running_stats

        def buffer(*shape: int, dtype: torch.dtype = statistics_dtype) -> Optional[Tensor]:
            return torch.empty(shape, device=device, dtype=dtype) if track else None

        self.register_buffer("running_mean", buffer(num_features))
        self.register_buffer("running_var", buffer(num_features))
        self.register_buffer("num_batches_tracked", buffer(dtype=torch.long))
        self.register_buffer("feature_similarity", buffer(dtype=torch.float32))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Resets all buffers to their initial values."""
        state = self._state()
        if state is not None:
            state.mean.zero_()
            state.var.fill_(1)
            state.batches.zero_()
            state.similarity.fill_(1)

    def reset_parameters(self) -> None:
        """Resets all parameters and buffers to their initial values; "kaiming" kernels are redrawn."""
        self.reset_running_stats()
        for name, initial in CALIBRATIONS.items():
            parameter = getattr(self, name)
            if parameter is not None:
                nn.init.constant_(parameter, initial)
        self.set_affine(torch.ones(self.num_features), torch.zeros(self.num_features))
        if self.weight is not None and self.kernel_init == "kaiming":
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def set_affine(self, weight: Tensor, bias: Tensor) -> None:
        """Sets the affine to a BatchNorm's; exact while ``scale_weight`` is 0 and ``scale_bias`` is 1.

        Args:
            weight: BatchNorm's weight (C,).
            bias: BatchNorm's bias (C,).
        """
        if self.weight is None or self.bias is None:
            return
        gain = affine_gain(self.scale_bias is not None)
        with torch.no_grad():
            self.weight.copy_(identity_kernel(weight.to(self.weight), self.kernel_size, gain))
            self.bias.copy_(bias.to(self.bias) * gain)

    def _bundle(self) -> Parameters:
        return Parameters(self.weight, self.bias, self.center_weight, self.scale_weight, self.scale_bias)

    def _state(self) -> Optional[State]:
        if (
            self.running_mean is None
            or self.running_var is None
            or self.feature_similarity is None
            or self.num_batches_tracked is None
        ):
            return None
        return State(self.running_mean, self.running_var, self.feature_similarity, self.num_batches_tracked)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W), keeping its dtype and memory format; training updates the buffers."""
        if torch.jit.is_scripting():
            return self._equations(input)
        return self._dispatch(input)

    @torch.jit.unused
    def _dispatch(self, input: Tensor) -> Tensor:
        if internals.is_proxy(input):
            return internals.leaf_call(self, input)
        return self._run(input, self._choose_path(input))

    def _choose_path(self, input: Tensor) -> ModuleType:
        """The module that computes this call."""
        self._check_shape(input)
        if self.training and not self.frozen and self._sync is not None and self._sync.active():
            return distributed
        # Exported programs use the plain equations. So do the transforms of torch.func, for which the other
        # implementations have no rules.
        if self._equations_only or internals.is_capturing():
            return functional
        return operators if operators.usable(input, self.kernel_size) else autograd

    def _run(self, input: Tensor, path: ModuleType, relu: bool = False) -> Tensor:
        """Computes the layer with the given module; only ``operators`` can include a ReLU."""
        device_type = input.device.type
        if internals.autocast_enabled(device_type):
            # The layer handles precision itself; autocast would run the affine of float32 inputs in lower precision.
            with torch.autocast(device_type, enabled=False):
                return self._run(input, path, relu)
        if path is functional:
            return self._equations(input)
        state, parameters = self._state(), self._bundle()
        training = self.training and not self.frozen
        recomputing = training and internals.is_in_backward()
        if training and (path is distributed or not torch.compiler.is_compiling()):
            distributed.equalize_ddp_buffers()
            overlooked.check_training(self)
        if path is not distributed and input.numel() == 0:
            if training and state is not None and not recomputing:
                state.batches.add_(1)
            return autograd.empty_output(input, parameters)

        gate: Union[Tensor, bool] = False
        if not training and state is not None:
            instance_mean = path.instance_means(input)
            mean, var = state.mean.to(instance_mean.dtype), state.var.to(instance_mean.dtype)
        else:
            instance_mean, mean, var, gate = self._batch_statistics(input, path, state, training, recomputing)
        arguments = (input, instance_mean, mean, var, gate, parameters, self.eps)
        output: Tensor = path.calibrated_affine(*arguments, relu) if relu else path.calibrated_affine(*arguments)
        return output

    def _batch_statistics(
        self, input: Tensor, path: ModuleType, state: Optional[State], training: bool, recomputing: bool
    ) -> Tuple[Tensor, Tensor, Tensor, Union[Tensor, bool]]:
        """Updates the state; returns instance means, the statistics to normalize with, and the gate."""
        recalling = recomputing and len(self._records) > 0
        gated = training and state is not None and self.threshold is not None and not recalling
        samples = self.similarity_samples if gated else None
        count: Union[Tensor, int]
        if path is distributed and self._sync is not None:
            instance_mean, mean, var, similarity, count = distributed.statistics(
                input, self.center_weight, samples, self._sync
            )
        else:
            self._check_values(input)
            instance_mean, mean, var, similarity = path.statistics(input, self.center_weight, samples)
            count = input.numel() // input.shape[1]
        if not training or state is None:
            return instance_mean, mean, var, True
        if recalling:
            return instance_mean, *self._records.recall(mean, var)
        # A recomputation without a record does not update the state either.
        settings = (self.momentum, self.similarity_momentum, self.threshold)
        used_mean, used_var, gate = path.finalize(mean, var, similarity, state, count, *settings, not recomputing)
        if gated and recompute.may_be_recomputed():
            self._records.add(mean, gate, used_mean, used_var)
        return instance_mean, used_mean, used_var, gate

    def _check_shape(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected an input of 4 dimensions (N, C, H, W), got shape {list(input.shape)}")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected an input with {self.num_features} channels (N, {self.num_features}, H, W), "
                f"got shape {list(input.shape)}"
            )

    def _check_values(self, input: Tensor) -> None:
        if input.shape[0] * input.shape[2] * input.shape[3] == 1:
            raise ValueError(
                f"expected more than 1 value per channel in training, got input shape {list(input.shape)}: "
                "a single value has no variance. Use a larger batch, or evaluation mode."
            )

    def _equations(self, input: Tensor) -> Tensor:
        self._check_shape(input)
        training = self.training and not self.frozen
        if training or self.running_mean is None:
            self._check_values(input)
        return functional.unified_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.feature_similarity,
            self.num_batches_tracked,
            self.weight,
            self.bias,
            self.center_weight,
            self.scale_weight,
            self.scale_bias,
            training,
            self.momentum,
            self.eps,
            self.threshold,
            self.similarity_momentum,
            self.similarity_samples,
        )

    def named_children(self) -> Iterator[Tuple[str, nn.Module]]:
        overlooked.check_walk(self)
        return super().named_children()

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"
        text += f", track_running_stats={self.track_running_stats}, threshold={self.threshold}"
        text += f", kernel_size={self.kernel_size}, center_calibration={self.center_weight is not None}"
        text += f", scale_calibration={self.scale_weight is not None}"
        if self.frozen:
            text += ", frozen=True"
        if self._sync is not None:
            text += ", synchronized=True"
        return text

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: self._buffers[name] for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is None or after is None:
                continue
            # Running averages stop changing in half precision, and float16 cannot hold a large variance: keep their
            # dtype.
            if after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device)
            elif name == "feature_similarity" and after.dtype != torch.float32:
                self._buffers[name] = after.float()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        upgrade_layer_state(state_dict, prefix, self)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> Dict[str, Any]:
        # Records belong to a step in progress, so they are not copied or pickled.
        return {**self.__dict__, "_records": recompute.Records()}


@register_notrace_module
class UnifiedBatchNormAct2d(UnifiedBatchNorm2d):
    """Unified Batch Normalization followed by an activation, with the signature of timm's ``BatchNormAct2d``.

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        affine: Whether there is a depthwise affine.
        track_running_stats: Whether the layer keeps running statistics.
        apply_act: Whether to apply the activation.
        act_layer: The activation: a module class, a function that returns a module, or timm's name for one.
        act_kwargs: Keyword arguments of the activation.
        inplace: Whether the activation works in place, unless ``act_kwargs`` says otherwise.
        drop_layer: Returns the module between normalization and activation, DropBlock for example.
        **settings: The keyword settings of :class:`UnifiedBatchNorm2d`, ``device`` and ``dtype`` included.

    Attributes:
        drop: The module that ``drop_layer`` returned, or an identity.
        act: The activation, or an identity.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Union[str, Callable[..., nn.Module], Type[nn.Module], None] = nn.ReLU,
        act_kwargs: Optional[Dict[str, Any]] = None,
        inplace: bool = True,
        drop_layer: Optional[Callable[[], nn.Module]] = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **settings)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        act = create_act_layer(act_layer, **{"inplace": inplace, **(act_kwargs or {})}) if apply_act else None
        self.act = nn.Identity() if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes and activates (N, C, H, W), keeping its dtype and memory format; training updates the buffers."""
        if torch.jit.is_scripting():
            return self.act(self.drop(self._equations(input)))
        return self._dispatch(input)

    @torch.jit.unused
    def _dispatch(self, input: Tensor) -> Tensor:
        if internals.is_proxy(input):
            return internals.leaf_call(self, input)
        path = self._choose_path(input)
        if path is operators and self.only_relu():
            return self._run(input, path, relu=True)
        return self.act(self.drop(self._run(input, path)))

    @torch.jit.unused
    def only_relu(self) -> bool:
        """Whether a plain ReLU follows the normalization, so that one kernel can compute both."""
        plain = type(self.act) is nn.ReLU and type(self.drop) is nn.Identity
        return plain and has_no_hooks(self.act) and has_no_hooks(self.drop)
