"""Convert weights to a UBN safetensors file.

Reads weights of BatchNorm models, UBN models and the paper's authors, in safetensors or torch format. The converted
model computes the same function.

Examples:
    ubn-zoo convert resnet50_ubn
    ubn-zoo convert resnet18_ubn --checkpoint resnet18.pth --num-classes 10 --output resnet18_ubn.safetensors
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="model or model.tag to convert")
    parser.add_argument("--checkpoint", metavar="FILE", help="convert this file instead of the pretrained weights")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes in the file (default: the model's)")
    parser.add_argument("--output", metavar="FILE", help="file to write (default: NAME.safetensors in this folder)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache folder (default: huggingface_hub's)")


def run(options: argparse.Namespace) -> int:
    """Convert the weights and print the name of the file."""
    from ubn_zoo.models import catalog
    from ubn_zoo.release import convert

    output = options.output or f"{catalog.describe(options.name).name}.safetensors"
    convert.convert(
        options.name,
        output,
        checkpoint=options.checkpoint,
        num_classes=options.num_classes,
        force=options.force,
        cache_dir=options.cache_dir,
    )
    print(output)
    return 0
