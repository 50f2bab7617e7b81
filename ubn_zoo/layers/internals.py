"""All uses of torch's private APIs by the layer, mostly to detect the context in which a forward runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

__all__ = [
    "autocast_enabled",
    "backward_node",
    "has_saved_tensor_hooks",
    "is_capturing",
    "is_exporting",
    "is_in_backward",
    "is_proxy",
    "is_transformed",
    "leaf_call",
    "sequence_number",
    "unaliased",
    "without_modes",
]


@torch.compiler.assume_constant_result
def _autocast_available(device_type: str) -> bool:
    # Dynamo of torch 2.11 cannot trace this function, hence the constant.
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device; False for types without autocast."""
    return _autocast_available(device_type) and torch.is_autocast_enabled(device_type)


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether ``torch.export`` runs; unlike torch's function, also False under ``torch.compile`` in torch 2.11."""
    return torch.compiler.is_exporting()


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_capturing() -> bool:
    """Whether the program is being traced or exported, or runs under a transform of ``torch.func``."""
    return torch.jit.is_tracing() or is_exporting() or is_transformed()


def is_proxy(value: Any) -> bool:
    """Whether ``torch.fx`` traces symbolically: the value stands for a tensor and has neither shape nor data."""
    return not torch.compiler.is_compiling() and isinstance(value, torch.fx.Proxy)


def leaf_call(module: nn.Module, input: Any) -> Any:
    """Records a module as one call in the graph that ``torch.fx`` traces, as it does modules of ``torch.nn``.

    Args:
        module: The module whose forward is being traced.
        input: The proxy that it was called with.

    Returns:
        The proxy of its output.

    Raises:
        TypeError: The module itself is traced, so that its graph cannot call it.
    """
    name = input.tracer.path_of_module(module)
    if not name:
        raise TypeError(
            f"torch.fx cannot trace a {type(module).__name__} itself, only a model that contains it: "
            "trace torch.nn.Sequential(layer)"
        )
    return input.tracer.create_proxy("call_module", name, (input,), {})


def is_in_backward() -> bool:
    """Whether the autograd engine is running: a forward now is a recomputation by activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def has_saved_tensor_hooks() -> bool:
    """Whether hooks on saved tensors are active, as under non-reentrant activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def sequence_number() -> int:
    """The number of operations that autograd has recorded in this thread."""
    return torch.autograd._get_sequence_nr()


def backward_node() -> tuple[str, int] | None:
    """Name and sequence number of the autograd node whose backward is running, if any."""
    node: Any = torch._C._current_autograd_node()
    return None if node is None else (node.name(), node._sequence_nr())


# Dynamo of torch 2.11 returns an autograd function's intermediate results beside its output. One that aliases the
# output, as the operand of an in-place operation does, receives the output's gradient, and backward receives zeros.
_ALIASES_TAKE_GRADIENTS = torch.__version__ < "2.12"


def unaliased(output: Tensor) -> Tensor:
    """Makes the result of in-place operations fit to be an autograd function's output under ``torch.compile``."""
    return output.clone() if _ALIASES_TAKE_GRADIENTS and torch.compiler.is_compiling() else output


def without_modes() -> Any:
    """A context that disables all dispatch modes, such as those of tracers, so that new tensors hold values."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
