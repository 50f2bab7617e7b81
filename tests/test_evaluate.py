"""Accuracy against what can be worked out by hand."""

from __future__ import annotations

import numpy
import pytest
import timm
import torch
from images import striped_images
from torch import nn

from ubn_zoo.data import ImageSet, Normalizer
from ubn_zoo.evaluate import evaluate, predict, predict_as_configured


class Reference(nn.Module):
    """Logits that can be worked out by hand: the mean of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images.mean((2, 3))


def test_accuracy_counts_every_image_once() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (37,), generator=generator)
    normalize = Normalizer((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.device("cpu"))
    model = Reference().train()
    found = evaluate(model, ImageSet(images, labels, ("a", "b", "c")), normalize, img_size=4, batch_size=5)
    means = images.double().numpy().mean((2, 3)) / 255
    probabilities = numpy.exp(means) / numpy.exp(means).sum(1, keepdims=True)
    assert found.images == 37
    assert found.top1 == pytest.approx(100 * (means.argmax(1) == labels.numpy()).mean())
    assert found.loss == pytest.approx(-numpy.log(probabilities[numpy.arange(37), labels.numpy()]).mean(), rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="received 0 images"):
        predict(model, images[:0], normalize, img_size=4)


def test_models_are_fed_as_their_configuration_says() -> None:
    cfg = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0}
    images = striped_images(4, seed=6).images
    model = timm.create_model(
        "resnet10t_ubn", num_classes=2, pretrained_cfg_overlay={**cfg, "interpolation": "bilinear"}
    )
    normalize = Normalizer(cfg["mean"], cfg["std"], torch.device("cpu"))
    expected = predict(model, images, normalize, img_size=64)
    torch.testing.assert_close(predict_as_configured(model, images), expected)
    with pytest.raises(ValueError, match="images: received"):
        predict_as_configured(model, images[:, :, :8])
    other = timm.create_model("resnet10t_ubn", num_classes=2)
    with pytest.raises(ValueError, match=r"the model's input: received .*crop_pct 0\.875"):
        predict_as_configured(other, images)
