"""torchvision's reference script for COCO with detectors whose backbone has UBN, or BatchNorm that trains.

    torchrun --nproc-per-node 8 -m research.downstream.coco vision/references/detection/train.py --dataset coco \
        --data-path COCO --model fasterrcnn_resnet50_fpn_ubn --weights-backbone IMAGENET1K_V1 --sync-bn ...

`_ubn` or `_bn` after the name of a torchvision detector with a ResNet-50 pyramid chooses the norm.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torchvision.models import detection
from torchvision.models._api import register_model

from ubn_zoo import convert_batchnorm, interop
from ubn_zoo.cli import main

DETECTORS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn")
# BatchNorm is UBN with its parts switched off, so that torchvision's frozen layers train in both models.
SETTINGS: dict[str, dict[str, Any]] = {
    "ubn": {},
    "bn": {"threshold": None, "center_calibration": False, "scale_calibration": False, "depthwise_affine": False},
}


def _register(detector: str, norm: str) -> None:
    def create(**arguments: Any) -> nn.Module:
        model: Any = getattr(detection, detector)(**arguments)
        convert_batchnorm(model, include="backbone.body", **SETTINGS[norm])
        # With pretrained weights all norms are frozen, and stem and first stage stay so, as their convolutions.
        interop.unfreeze(model.backbone.body, ["layer2", "layer3", "layer4"])
        return model

    register_model(f"{detector}_{norm}")(create)


for _detector in DETECTORS:
    for _norm in SETTINGS:
        _register(_detector, _norm)

if __name__ == "__main__":
    sys.exit(main(["exec", *sys.argv[1:]]))
