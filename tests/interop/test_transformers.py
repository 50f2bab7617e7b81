"""transformers: backbones with frozen norms, and folders that both libraries read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.interop.common import TWIN, images, moved, statistics, twin, ubn_layers
from ubn_zoo import freeze_ubn, interop
from ubn_zoo.models.hub_config import describe_model
from ubn_zoo.training.checkpoint import tensor_bytes

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop


def backbone() -> nn.Module:
    config = transformers.TimmBackboneConfig(
        backbone=TWIN, use_pretrained_backbone=False, freeze_batch_norm_2d=True, out_indices=(1, 2, 3)
    )
    return transformers.AutoBackbone.from_config(config)


def test_backbone_with_frozen_norms() -> None:
    with interop.install():
        model = backbone()
    before = statistics(model)
    model.train()(images())
    assert moved(before, model) == 0 and all(layer.frozen for layer in ubn_layers(model))


def test_backbone_warns_that_its_norms_are_not_frozen() -> None:
    from ubn_zoo.layers import overlooked

    overlooked._warned.clear()
    with pytest.warns(UserWarning, match="does not freeze UBN layers"):
        backbone()


def detr(**arguments: object) -> nn.Module:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads"), 2
    )
    widths = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    config = transformers.DetrConfig(
        use_timm_backbone=True,
        backbone=TWIN,
        use_pretrained_backbone=False,
        backbone_config=None,
        num_queries=5,
        **sizes,
        **widths,
        **arguments,
    )
    return transformers.DetrForObjectDetection(config)


def check_detr(model: nn.Module) -> None:
    layers = ubn_layers(model)
    before = statistics(model)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])} for _ in range(2)]
    model.train()(images(2), labels=labels).loss.backward()
    assert layers and moved(before, model) == 0
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    assert model.model.backbone.model.layer4[0].conv1.weight.grad is not None


def test_detr_has_frozen_norms() -> None:
    with interop.install():
        model = detr()
    check_detr(model)


def test_detr_by_hand() -> None:
    model = detr()
    freeze_ubn(model.model.backbone)
    check_detr(model)


def test_detr_warns_that_its_norms_are_not_frozen() -> None:
    from ubn_zoo.layers import overlooked

    overlooked._warned.clear()
    with pytest.warns(UserWarning, match="replace_batch_norm does not freeze UBN layers"):
        detr()


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A folder of a run or publication, and its model."""
    model = twin().eval()
    generator = torch.Generator().manual_seed(3)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    config = describe_model(
        model, model_config={"label_names": ["ant", "bee", "cat"]}, data_config={"input_size": (3, 64, 64)}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(tensor_bytes(model.state_dict()))
    return tmp_path, model


def test_auto_model_reads_what_the_zoo_writes_and_timm_what_it_saves(
    folder: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    path, model = folder
    theirs = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert torch.equal(theirs(images()).logits, model(images()))
    theirs.save_pretrained(tmp_path / "saved")
    back = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert type(back) is type(model) and back.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    assert torch.equal(back(images()), model(images()))


def test_new_classes(folder: tuple[Path, nn.Module]) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder[0], num_labels=5, ignore_mismatched_sizes=True
    )
    assert model(images()).logits.shape == (4, 5)


def test_pipeline(folder: tuple[Path, nn.Module]) -> None:
    classify = transformers.pipeline("image-classification", model=str(folder[0]))
    answers = classify(Image.new("RGB", (70, 70), "red"))
    assert {answer["label"] for answer in answers} == {"ant", "bee", "cat"}


def test_trainer(folder: tuple[Path, nn.Module], tmp_path: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder[0])
    data = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images(12))]
    settings = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=3, report_to=[], use_cpu=True
    )
    before = statistics(model)
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=data)
    trainer.train()
    assert moved(before, model) > 0 and int(ubn_layers(model)[0].num_batches_tracked) == 3
    trainer.save_model(str(tmp_path / "trained"))
    back = timm.create_model(f"local-dir:{tmp_path / 'trained'}", pretrained=True).eval()
    torch.testing.assert_close(back(images()), model.eval()(images()).logits)
