"""The families of the zoo: one row for each module of timm whose BatchNorm architectures have a UBN twin.

A new family is one new row. A rule decides which architectures of a module have BatchNorm, see
:mod:`ubn_zoo.models.registry`, so no row lists names.
"""

from __future__ import annotations

import dataclasses

__all__ = ["FAMILIES", "Family"]


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One module of timm.

    Attributes:
        source: The module's name, without its package: ``resnet`` for ``timm.models.resnet``.
        title: Its architectures, as a heading.
    """

    source: str
    title: str

    @property
    def module(self) -> str:
        """Name of the twins' module: ``timm.list_models(module=...)`` finds them by it."""
        return f"ubn_{self.source}"


FAMILIES = (
    Family("resnet", "ResNet, ResNet-D, ResNeXt, Wide ResNet, SE-ResNet, ECA-ResNet, ResNet-RS"),
    Family("resnetv2", "ResNetV2 with BatchNorm"),
    Family("regnet", "RegNetX, RegNetY, RegNetZ, RegNetV"),
    Family("mobilenetv3", "MobileNetV3, MobileNetV4, FBNetV3, LCNet"),
    Family("efficientnet", "EfficientNet, EfficientNetV2, MobileNetV1, MobileNetV2, MNASNet, MixNet, TinyNet, FBNet"),
    Family("byobnet", "RepVGG, MobileOne, GENet, CLIP's ResNets, ResNets and RegNets of blocks"),
    Family("byoanet", "Bottleneck Transformers, HaloNet, LambdaNet"),
    Family("cspnet", "CSPNet, Darknet"),
    Family("cspnext", "CSPNeXt"),
    Family("densenet", "DenseNet"),
    Family("dpn", "Dual-Path Networks"),
    Family("efficientformer", "EfficientFormer"),
    Family("efficientformer_v2", "EfficientFormerV2"),
    Family("efficientvit_mit", "EfficientViT (MIT)"),
    Family("cpubone", "CPUBone"),
    Family("fasternet", "FasterNet"),
    Family("fastvit", "FastViT"),
    Family("hardcorenas", "HardCoRe-NAS"),
    Family("inception_next", "InceptionNeXt"),
    Family("inception_resnet_v2", "Inception-ResNet-v2"),
    Family("inception_v3", "Inception-v3"),
    Family("inception_v4", "Inception-v4"),
    Family("lcnetv2", "PP-LCNetV2"),
    Family("lowformer", "LowFormer"),
    Family("mobilevit", "MobileViT, MobileViTv2"),
    Family("nextvit", "Next-ViT"),
    Family("res2net", "Res2Net"),
    Family("resnest", "ResNeSt"),
    Family("sknet", "Selective Kernel Networks"),
    Family("vgg", "VGG with BatchNorm"),
    Family("visformer", "Visformer"),
    Family("vovnet", "VoVNet, ESE-VoVNet"),
    Family("xception_aligned", "Aligned Xception"),
)
