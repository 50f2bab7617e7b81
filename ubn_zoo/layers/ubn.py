"""The Unified Batch Normalization modules: parameters, buffers and dispatch; the maths lives in :mod:`.functional`."""

import functools
import math
from collections import deque
from types import ModuleType
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, NamedTuple, Optional, Tuple, Type, Union

import torch
from timm.layers import create_act_layer, register_notrace_module
from torch import Tensor, nn

from . import autograd, distributed, functional, fused
from .state import CALIBRATIONS, affine_gain, identity_kernel, upgrade_layer_state

__all__ = ["UnifiedBatchNorm2d", "UnifiedBatchNormAct2d"]

# How many checkpointed forwards of one layer may be in flight and still be recomputed exactly, see `_StepRecord`.
_RECORDS = 64
_STATISTICS = ("running_mean", "running_var", "feature_similarity")


class _StepRecord(NamedTuple):
    """What one training forward decided, kept for activation checkpointing, which runs that forward again in backward.

    By then the state has moved. The second run finds its own record by the mean of its batch, so a layer that is called
    several times in one step gets each call's decision back. Identical batches are told apart by autograd's count of
    operations.
    """

    batch_mean: Tensor
    gate: Tensor
    mean: Tensor
    var: Tensor
    sequence: int  # autograd's count at the first run
    with_grad: bool  # whether that took gradients: not under the reentrant kind of checkpointing


class _State(NamedTuple):
    """The buffers, where running statistics are kept."""

    mean: Tensor
    var: Tensor
    batches: Tensor
    similarity: Tensor


def is_transformed() -> bool:
    """Whether a transform of torch.func runs the layer."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _in_backward() -> bool:
    """Whether the autograd engine is running: a forward now is a recomputation by activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _may_be_recomputed() -> bool:
    """Whether this forward may be under activation checkpointing.

    The reentrant kind runs it without gradients, the other one under hooks on saved tensors.
    """
    if torch.compiler.is_compiling() or _in_backward():
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def without_autocast(input: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Calls a layer that looks after its own precisions; autocast would lower the affine's for float32 inputs."""
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return function(input)
    return function(input)


def without_hooks(module: nn.Module) -> bool:
    """Whether nothing looks at what a module is given and returns, so that it need not be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


@register_notrace_module
class UnifiedBatchNorm2d(nn.Module):
    """Unified Batch Normalization over (N, C, H, W) inputs, a drop-in replacement of ``torch.nn.BatchNorm2d``.

    A running cosine similarity between samples gates the statistics: while features are condensed (similarity above
    ``threshold``) the batch's statistics normalize and the running ones move; otherwise the running statistics
    normalize and stay as they are. Centering and scaling are calibrated per instance, and the affine is a depthwise
    convolution. Source: Wang et al., arXiv 2311.15993; the equations are in :mod:`ubn_zoo.layers.functional`.

    With the parts switched off one by one this layer is RBN (``threshold=None, depthwise_affine=False``), BNET
    (``threshold=None, center_calibration=False, scale_calibration=False``) and BatchNorm (all of these).

    Statistics are computed, and ``running_mean``, ``running_var`` and ``feature_similarity`` are kept, in float32
    (float64 for float64 modules) whatever half precision the module is cast to. Layer methods never wait for the
    device.

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        affine: Whether there is a depthwise affine (``weight`` and ``bias``).
        track_running_stats: Whether running statistics are kept. Without them batch statistics normalize always, in
            evaluation too, and there is no gate.
        threshold: Gate threshold tau on ``feature_similarity``; None switches the gate off (always batch statistics).
        similarity_momentum: Weight of a batch in ``feature_similarity``.
        similarity_samples: Leading samples of a batch whose similarity is measured.
        kernel_size: Taps per side of the depthwise affine, odd.
        kernel_init: "identity" starts as BatchNorm; "kaiming" draws the depthwise kernel from
            N(0, 2 / (kernel_size^2 C)), as the authors do.
        center_calibration: Whether there is a centering calibration (``center_weight``).
        scale_calibration: Whether there is a scaling calibration (``scale_weight``, ``scale_bias``).
        depthwise_affine: False for BatchNorm's affine, one tap per channel whatever ``kernel_size``.
        device: Of parameters and buffers.
        dtype: Of parameters.

    Attributes:
        weight: (C, 1, k, k) depthwise kernel.
        bias: (C,), starts at 0.
        center_weight: (C,), starts at 0.
        scale_weight: (C,), starts at 0.
        scale_bias: (C,), starts at 1.
        running_mean: (C,) buffer, starts at 0.
        running_var: (C,) buffer, unbiased, starts at 1.
        num_batches_tracked: Integer scalar buffer, training steps seen.
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
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, valid are odd sizes from 1 on: the affine keeps H and W")
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
        self._records: Deque[_StepRecord] = deque(maxlen=_RECORDS)
        # Which parameters took gradients before freezing.
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
        """Puts all buffers back to their start."""
        state = self._state()
        if state is not None:
            state.mean.zero_()
            state.var.fill_(1)
            state.batches.zero_()
            state.similarity.fill_(1)

    def reset_parameters(self) -> None:
        """Puts all parameters and buffers back to their start; "kaiming" kernels are drawn anew."""
        self.reset_running_stats()
        for name, start in CALIBRATIONS.items():
            parameter = getattr(self, name)
            if parameter is not None:
                nn.init.constant_(parameter, start)
        self.set_affine(torch.ones(self.num_features), torch.zeros(self.num_features))
        if self.weight is not None and self.kernel_init == "kaiming":
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def set_affine(self, weight: Tensor, bias: Tensor) -> None:
        """Makes the affine that of a BatchNorm while ``scale_weight`` is 0 and ``scale_bias`` is 1.

        Args:
            weight: (C,) of BatchNorm.
            bias: (C,) of BatchNorm.
        """
        if self.weight is None or self.bias is None:
            return
        gain = affine_gain(self.scale_bias is not None)
        with torch.no_grad():
            self.weight.copy_(identity_kernel(weight.to(self.weight), self.kernel_size, gain))
            self.bias.copy_(bias.to(self.bias) * gain)

    def _state(self) -> Optional[_State]:
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
            or self.feature_similarity is None
        ):
            return None
        return _State(self.running_mean, self.running_var, self.num_batches_tracked, self.feature_similarity)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W), keeping its dtype and memory format; in training the buffers move."""
        return self._normalize(input)

    def _normalize(self, input: Tensor, relu: bool = False) -> Tensor:
        if input.dim() != 4:
            raise ValueError(f"expected an input of 4 dimensions (N, C, H, W), got shape {list(input.shape)}")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected an input with {self.num_features} channels (N, {self.num_features}, H, W), "
                f"got shape {list(input.shape)}"
            )
        if not torch.jit.is_scripting():
            return self._dispatch(input, relu)
        return self._reference(input)

    @torch.jit.unused
    def _uses_kernels(self, input: Tensor) -> bool:
        """Whether the kernels compute an input; synchronized statistics do without."""
        if not fused.usable(input, self.kernel_size) or is_transformed():
            return False
        return self._sync is None or not self.training or self.frozen or not self._sync.active()

    @torch.jit.unused
    def _dispatch(self, input: Tensor, relu: bool) -> Tensor:
        # What is exported is the equations alone. The transforms of torch.func take them too: they do not know the
        # autograd function of the other path.
        plain = torch.jit.is_tracing() or torch.compiler.is_exporting() or is_transformed()
        if plain and not (self._sync is not None and self.training and self._sync.active()):
            return without_autocast(input, self._reference)
        return without_autocast(input, functools.partial(self._eager, relu=True) if relu else self._eager)

    def _check_values(self, input: Tensor) -> None:
        if input.shape[0] * input.shape[2] * input.shape[3] == 1:
            raise ValueError(
                f"expected more than 1 value per channel in training, got input shape {list(input.shape)}: "
                "a single value has no variance. Use a larger batch, or evaluation mode."
            )

    def _reference(self, input: Tensor) -> Tensor:
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

    def _eager(self, input: Tensor, relu: bool = False) -> Tensor:
        state = self._state()
        training = self.training and not self.frozen
        path = fused if self._uses_kernels(input) else autograd
        if not training and state is not None:
            if input.numel() == 0:
                return self._empty(input)
            instance_mean = path.instance_means(input)
            mean, var = state.mean.to(instance_mean.dtype), state.var.to(instance_mean.dtype)
            return self._affine(path, input, instance_mean, mean, var, False, relu)

        sync = self._sync if training and self._sync is not None and self._sync.active() else None
        if input.numel() > 0 and sync is None:
            self._check_values(input)
        recomputing = training and _in_backward()
        if training:
            if sync is not None or not torch.compiler.is_compiling():
                distributed.equalize_ddp_buffers()
            if state is not None and not recomputing:
                state.batches.add_(1)
        recalling = recomputing and len(self._records) > 0
        gated = state is not None and self.threshold is not None and training and not recalling
        if sync is not None:
            return self._synchronized(input, sync, gated, recomputing)
        if input.numel() == 0:
            return self._empty(input)
        samples = self.similarity_samples if gated else None
        instance_mean, mean, var, similarity = path.statistics(input, self.center_weight, samples)
        gate: Union[Tensor, bool] = True
        if training and state is not None:
            count = input.numel() // input.shape[1]
            mean, var, gate = self._step(path, state, mean, var, count, similarity, recomputing)
        return self._affine(path, input, instance_mean, mean, var, gate, relu)

    def _synchronized(self, input: Tensor, sync: distributed.SyncGroup, gated: bool, recomputing: bool) -> Tensor:
        instance_mean, instance_var = functional.instance_moments(input)
        pixels = input.shape[2] * input.shape[3]
        mean, var, count, samples = distributed.batch_statistics(
            instance_mean, instance_var, self.center_weight, pixels, sync
        )
        state = self._state()
        if state is not None:
            similarity = None
            if gated:
                similarity = distributed.feature_similarity(input.detach(), self.similarity_samples, samples, sync)
            mean, var, _ = self._step(autograd, state, mean, var, count, similarity, recomputing)
        return functional.calibrated_affine(
            input,
            instance_mean,
            mean,
            var,
            self.weight,
            self.bias,
            self.center_weight,
            self.scale_weight,
            self.scale_bias,
            self.eps,
        )

    def _step(
        self,
        path: ModuleType,
        state: _State,
        mean: Tensor,
        var: Tensor,
        count: Union[Tensor, int],
        similarity: Optional[Tensor],
        recomputing: bool,
    ) -> Tuple[Tensor, Tensor, Union[Tensor, bool]]:
        """Decides the gate and moves the state; returns the statistics to normalize with and the gate."""
        if recomputing and self._records:
            recalled, first_mean, first_var = self._recall(mean)
            return torch.where(recalled, mean, first_mean), torch.where(recalled, var, first_var), recalled
        batch_mean = mean
        # A recomputation without a record moves nothing either.
        mean, var, gate = path.finalize(
            mean,
            var,
            similarity,
            state.mean,
            state.var,
            state.similarity,
            state.batches,
            self.momentum,
            count,
            self.similarity_momentum,
            self.threshold,
            not recomputing,
        )
        if similarity is not None and self.threshold is not None and _may_be_recomputed():
            self._records.appendleft(
                _StepRecord(
                    batch_mean.detach(),
                    gate,
                    mean.detach(),
                    var.detach(),
                    torch.autograd._get_sequence_nr(),
                    torch.is_grad_enabled(),
                )
            )
        return mean, var, gate

    def _recall(self, batch_mean: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """The gate and the statistics of the first run of the forward that is being recomputed."""
        # Autograd counts its nodes in the order of the forward. The node whose backward asks for this recomputation is
        # either the reentrant checkpoint itself, made just before the first run, or one of the last operations of a
        # non-reentrant segment, made after it. Records on the right side of it come first, the nearest ahead; among
        # equal means the first is taken.
        node = torch._C._current_autograd_node()
        count = node._sequence_nr() if node is not None else -1
        if node is not None and node.name() == "CheckpointFunctionBackward":
            likely = [record for record in reversed(self._records) if not record.with_grad and record.sequence > count]
        else:
            likely = [record for record in self._records if record.with_grad and record.sequence <= count]
        chosen = {id(record) for record in likely}
        records = likely + [record for record in self._records if id(record) not in chosen]
        distances = torch.stack([(record.batch_mean - batch_mean.detach()).abs().sum() for record in records])
        nearest = distances.argmin()[None]
        gates, means, variances = (
            torch.stack(values).index_select(0, nearest)[0]
            for values in zip(*((record.gate, record.mean, record.var) for record in records), strict=True)
        )
        return gates, means, variances

    def _affine(
        self,
        path: ModuleType,
        input: Tensor,
        instance_mean: Tensor,
        mean: Tensor,
        var: Tensor,
        gate: Union[Tensor, bool],
        relu: bool,
    ) -> Tensor:
        # Only the kernels compute what follows the norm.
        extra = {"relu": True} if relu else {}
        output: Tensor = path.calibrated_affine(
            input,
            instance_mean,
            mean,
            var,
            gate,
            self.weight,
            self.bias,
            self.center_weight,
            self.scale_weight,
            self.scale_bias,
            self.eps,
            **extra,
        )
        return output

    def _empty(self, input: Tensor) -> Tensor:
        # Nothing to normalize; the parameters stay in the graph, with zero gradients, as DistributedDataParallel needs.
        total = torch.zeros([], dtype=input.dtype, device=input.device)
        for parameter in self.parameters(recurse=False):
            total = total + parameter.sum().to(input.dtype)
        return input * total

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
            # Running averages stall in half precision (and float16 cannot hold a large variance): they keep their own.
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
        # Records belong to a step in flight; they are neither copied nor stored.
        return {**self.__dict__, "_records": deque(maxlen=_RECORDS)}


@register_notrace_module
class UnifiedBatchNormAct2d(UnifiedBatchNorm2d):
    """Unified Batch Normalization followed by an activation, with the signature of timm's ``BatchNormAct2d``.

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        affine: Whether there is a depthwise affine.
        track_running_stats: Whether running statistics are kept.
        apply_act: Whether the activation is applied.
        act_layer: Activation, a module class, a function that makes a module, or timm's name of one.
        act_kwargs: Arguments of the activation.
        inplace: Whether the activation may work in place, where ``act_kwargs`` does not say.
        drop_layer: Makes the module between normalization and activation (DropBlock, say).
        **settings: The keyword settings of :class:`UnifiedBatchNorm2d`, ``device`` and ``dtype`` included.

    Attributes:
        drop: What ``drop_layer`` made, or an identity.
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
        """Normalizes and activates (N, C, H, W), keeping its dtype and memory format."""
        if torch.jit.is_scripting():
            return self.act(self.drop(self._normalize(input)))
        return self._activated(input)

    @torch.jit.unused
    def _activated(self, input: Tensor) -> Tensor:
        if self.only_relu() and input.dim() == 4 and self._uses_kernels(input):
            return self._normalize(input, relu=True)
        return self.act(self.drop(self._normalize(input)))

    @torch.jit.unused
    def only_relu(self) -> bool:
        """Whether the norm is followed by a ReLU and nothing else, so that the two may be computed as one."""
        plain = type(self.act) is nn.ReLU and type(self.drop) is nn.Identity
        return plain and without_hooks(self.act) and without_hooks(self.drop)
