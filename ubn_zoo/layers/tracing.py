"""Finds convolutions whose output is used only by a norm, by running the model instead of matching module names."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["feeding_convolutions", "has_forward_hooks"]

# Pixels per side of the input for models without a configuration of timm; on the "meta" device size costs nothing.
_SIDE = 224


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks observe or change the inputs or outputs of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@dataclass(eq=False)
class _Convolution:
    """Observations of a convolution during one run.

    Attributes:
        module: The convolution in the given model.
        ran: Whether it ran.
        consumers: The norms whose forward used its output; None stands for any other use.
        parameter_uses: How many operations used each parameter; two imply a use outside the convolution.
        output: Its output, while something holds a reference to it.
    """

    module: nn.Module
    ran: bool = False
    consumers: set[nn.Module | None] = field(default_factory=set)
    parameter_uses: dict[int, int] = field(default_factory=dict)
    output: weakref.ref[Tensor] | None = None


class _Watch(TorchDispatchMode):
    """Follows the outputs of convolutions, as objects, through one run of a model.

    This mode intercepts every operation, including those in scripted code and autograd functions, so it sees every use
    of an output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, _Convolution] = {}
        self.parameters: dict[int, list[_Convolution]] = {}
        self.running: list[nn.Module] = []
        self.sources: dict[nn.Module, _Convolution | None] = {}
        self.norm_calls: dict[nn.Module, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, Tensor):
                continue
            record = self.outputs.get(id(leaf))
            if record is not None:
                record.consumers.add(self.running[-1] if self.running else None)
            for owner in self.parameters.get(id(leaf), ()):
                owner.parameter_uses[id(leaf)] = owner.parameter_uses.get(id(leaf), 0) + 1
        return func(*args, **kwargs)

    def watch_convolution(self, module: nn.Module, record: _Convolution) -> None:
        for parameter in module.parameters(recurse=False):
            self.parameters.setdefault(id(parameter), []).append(record)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            record.ran = True
            if isinstance(output, Tensor):
                key = id(output)
                self.outputs[key] = record
                # Another tensor may reuse the id of a freed one.
                record.output = weakref.ref(output, lambda _: self.outputs.pop(key, None))

        module.register_forward_hook(after)

    def watch_norm(self, module: nn.Module, original: nn.Module) -> None:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.norm_calls[original] = self.norm_calls.get(original, 0) + 1
            self.sources[original] = self.outputs.get(id(args[0])) if len(args) == 1 else None
            self.running.append(original)

        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.running.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy on the "meta" device, where a run costs nothing; the model's tensors are not copied."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _usual_input(model: nn.Module, norms: Collection[nn.Module]) -> Tensor:
    """An image without values, of the size in timm's configuration and with the channels of the first layer."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(cfg.get("input_size") or (3, _SIDE, _SIDE))
    channels = (
        module.in_channels if isinstance(module, nn.Conv2d) else int(getattr(module, "num_features", 0))
        for module in model.modules()
        if isinstance(module, nn.Conv2d) or module in norms
    )
    tensors = itertools.chain(model.parameters(), model.buffers())
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return torch.empty(1, next(channels), *size[1:], dtype=dtype, device="meta")


def _pairs_of_a_run(
    model: nn.Module,
    norms: Collection[nn.Module],
    is_convolution: Callable[[nn.Module], bool],
    method: str,
    inputs: tuple[Any, ...],
) -> tuple[dict[nn.Module, nn.Module], set[nn.Module]]:
    """Runs a copy of the model and observes it; returns convolutions by norm, and all observed modules that ran."""
    valueless = all(leaf.is_meta for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    twin = (_without_values(model) if valueless else copy.deepcopy(model)).eval()
    watch = _Watch()
    records = []
    for original, module in zip(list(model.modules()), list(twin.modules()), strict=True):
        if original in norms:
            watch.watch_norm(module, original)
        elif is_convolution(original) and not has_forward_hooks(original):
            records.append(_Convolution(original))
            watch.watch_convolution(module, records[-1])
    with torch.no_grad(), watch:
        outputs = getattr(twin, method)(*inputs)

    pairs = {}
    for norm, record in watch.sources.items():
        if record is None or watch.norm_calls[norm] != 1:
            continue
        # A convolution that ran twice has used its weight twice.
        alone = record.consumers == {norm} and max(record.parameter_uses.values()) == 1
        if alone and record.output is not None and record.output() is None:
            pairs[norm] = record.module
    # Until here the model's outputs kept the convolution outputs among them alive.
    del outputs
    return pairs, set(watch.norm_calls) | {record.module for record in records if record.ran}


def feeding_convolutions(
    model: nn.Module,
    norms: Collection[nn.Module],
    is_convolution: Callable[[nn.Module], bool],
    example_inputs: tuple[Any, ...] | None = None,
) -> dict[nn.Module, nn.Module]:
    """Finds the norms whose input is a convolution's output that nothing else uses.

    A copy of the model runs once. A convolution and a norm are a pair if each ran once, the norm received the object
    that the convolution returned, no operation outside of the norm used it, nothing holds it after the run (an output
    of the model, an attribute, a hook's list), and nothing else uses the convolution's parameters. For timm's models
    the same must hold in ``forward_intermediates``, which returns features that ``forward`` keeps internal.

    Args:
        model: A model in evaluation mode; not changed.
        norms: The norms to look for, at least one.
        is_convolution: Whether a module is a convolution. Convolutions with forward hooks are left out.
        example_inputs: Arguments to call the model with; None for an image on the "meta" device.

    Returns:
        Convolutions by norm.

    Raises:
        ValueError: The model cannot be run without ``example_inputs``.
    """
    inputs = (_usual_input(model, norms),) if example_inputs is None else example_inputs
    methods = ["__call__"]
    if hasattr(model, "pretrained_cfg") and hasattr(model, "forward_intermediates"):
        methods.append("forward_intermediates")
    try:
        runs = [_pairs_of_a_run(model, norms, is_convolution, method, inputs) for method in methods]
    except Exception as error:
        if example_inputs is not None:
            raise
        raise ValueError(
            f"cannot find the convolutions that feed the norms: {type(model).__name__} does not run on an input of "
            f"shape {list(inputs[0].shape)} on the 'meta' device ({error}); pass example_inputs to call it with"
        ) from error
    (pairs, _), *others = runs
    for found, ran in others:
        pairs = {n: conv for n, conv in pairs.items() if found.get(n) is conv or not {n, conv} & ran}
    return pairs
