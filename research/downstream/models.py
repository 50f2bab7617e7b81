"""The table of models: detectors of torchvision and networks of segmentation_models_pytorch, each with either norm.

A UBN model is its BatchNorm sibling, converted: both start from the same weights and compute the same function.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from research.downstream.data import SIDE
from ubn_zoo import convert_batchnorm
from ubn_zoo.errors import InvalidArgumentError

NORMS = ("bn", "ubn")
_CHANNELS = 64


class Pyramid(nn.Module):
    """Features of a timm model at strides 4 to 32 and their pyramid, as torchvision's detectors expect them."""

    out_channels = _CHANNELS

    def __init__(self, encoder: str) -> None:
        super().__init__()
        body: Any = timm.create_model(encoder, features_only=True, out_indices=(1, 2, 3, 4))
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), _CHANNELS, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.body(images))))


def _detector(kind: Callable[..., nn.Module], encoder: str, **parts: Any) -> nn.Module:
    return kind(Pyramid(encoder), min_size=SIDE, max_size=SIDE, **parts)


def _anchors(per_level: int) -> AnchorGenerator:
    sizes = tuple(tuple(int(side * 2 ** (i / per_level)) for i in range(per_level)) for side in (8, 16, 32, 64, 128))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def _box_parts() -> dict[str, Any]:
    # As torchvision's own, with fewer channels.
    return {
        "rpn_anchor_generator": _anchors(1),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        "box_head": faster_rcnn.TwoMLPHead(_CHANNELS * 49, 256),
        "box_predictor": faster_rcnn.FastRCNNPredictor(256, 2),
        "box_batch_size_per_image": 64,
        "rpn_post_nms_top_n_train": 200,
        "rpn_post_nms_top_n_test": 100,
        "box_detections_per_img": 20,
    }


def _faster_rcnn(encoder: str) -> nn.Module:
    return _detector(detection.FasterRCNN, encoder, **_box_parts())


def _mask_rcnn(encoder: str) -> nn.Module:
    return _detector(
        detection.MaskRCNN,
        encoder,
        **_box_parts(),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        mask_head=mask_rcnn.MaskRCNNHeads(_CHANNELS, (_CHANNELS, _CHANNELS), 1),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(_CHANNELS, _CHANNELS, 2),
    )


def _retinanet(encoder: str) -> nn.Module:
    return _detector(detection.RetinaNet, encoder, num_classes=2, anchor_generator=_anchors(1), detections_per_img=20)


def _segmenter(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(f"tu-{encoder}", encoder_weights=None, classes=1)


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "fasterrcnn": _faster_rcnn,
    "retinanet": _retinanet,
    "maskrcnn": _mask_rcnn,
    "unet": lambda encoder: _segmenter("Unet", encoder),
    "deeplabv3plus": lambda encoder: _segmenter("DeepLabV3Plus", encoder),
}


def create(name: str, norm: str = "ubn", encoder: str = "resnet10t", seed: int = 0, **settings: Any) -> nn.Module:
    """A model with random weights, the same ones for both norms.

    Args:
        name: A name of :data:`MODELS`.
        norm: "ubn" or "bn". UBN replaces the backbone's norms in a detector, which has no others, and those of the
            encoder and the decoder in a segmentation network.
        encoder: A model of timm with BatchNorm.
        seed: Of the weights.
        **settings: Settings of the UBN layers; the threshold is 0.15 by default, as the authors'.

    Raises:
        InvalidArgumentError: An unknown name or norm.
    """
    if name not in MODELS or norm not in NORMS:
        raise InvalidArgumentError(f"{name!r} with norm {norm!r} is unknown; valid are {list(MODELS)} and {NORMS}")
    torch.manual_seed(seed)
    model = MODELS[name](encoder)
    return convert_batchnorm(model, **settings) if norm == "ubn" else model
