"""The zoo: a UBN twin of every BatchNorm architecture of timm's ResNet, RegNet and MobileNet families.

Importing this registers them with timm, so that ``timm.create_model("resnet50_ubn", pretrained=True)`` and timm's
listings know them. No model is built for that.
"""

from ubn_zoo.models import hub_config, ubn_mobilenet, ubn_regnet, ubn_resnet
from ubn_zoo.models.build import UbnModel, build_ubn_model
from ubn_zoo.models.weights import CheckpointError, read_checkpoint

__all__ = [
    "CheckpointError",
    "UbnModel",
    "build_ubn_model",
    "read_checkpoint",
    "ubn_mobilenet",
    "ubn_regnet",
    "ubn_resnet",
]

hub_config.install()
