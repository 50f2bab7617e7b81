"""The zoo: a UBN twin of every BatchNorm architecture of timm.

Importing this package registers them with timm, for ``timm.create_model("resnet50_ubn", pretrained=True)`` and for
timm's listings, without building a model. The twins of ``timm.models.resnet`` are the module ``ubn_resnet``, and
so on: ``timm.list_models(module="ubn_resnet")`` lists them; `FAMILIES` names all modules.
"""

from ubn_zoo.models import hub_config
from ubn_zoo.models.build import UbnModel, build_ubn_model
from ubn_zoo.models.families import FAMILIES, Family
from ubn_zoo.models.registry import register_families
from ubn_zoo.models.weights import CheckpointError, read_checkpoint

__all__ = ["FAMILIES", "CheckpointError", "Family", "UbnModel", "build_ubn_model", "read_checkpoint"]

hub_config.install()
register_families()
