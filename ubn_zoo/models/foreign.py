"""Rename the keys of other projects' checkpoints to timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["rename_keys"]

_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# A block with a 1x1 expansion has three convolutions; the first block of a network has two.
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def rename_keys(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename the keys of an ``efficientnet_pytorch`` checkpoint to timm's; other checkpoints are returned unchanged.

    ``efficientnet_pytorch`` numbers blocks across the network (``_blocks.3._bn0``); timm numbers stages and blocks
    within them (``blocks.2.0.bn1``). Unknown keys are kept, and the strict check reports them.

    Args:
        state_dict: State dict from a file.
        model: Model to load it into.

    Returns:
        A new dict.
    """
    network: Any = getattr(model, "blocks", None)
    if "_conv_stem.weight" not in state_dict or not isinstance(network, nn.Sequential):
        return dict(state_dict)
    stages: Any = network
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(stages) for block in range(len(blocks))]
    expanded = {int(match[1]) for key in state_dict if (match := _BLOCK.fullmatch(key)) and match[2] == "_expand_conv"}

    def renamed(key: str) -> str:
        match = _BLOCK.fullmatch(key)
        if match is None:
            head, _, rest = key.partition(".")
            return f"{_TOP[head]}.{rest}" if head in _TOP else key
        number = int(match[1])
        part = (_EXPANDED if number in expanded else _PLAIN).get(match[2])
        return key if part is None or number >= len(places) else f"{places[number]}.{part}.{match[3]}"

    return {renamed(key): value for key, value in state_dict.items()}
