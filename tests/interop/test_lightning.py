"""Lightning: frozen epochs, weight averaging, synchronization."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.interop.common import images, moved, statistics, twin, ubn_layers
from ubn_zoo import freeze_ubn, interop
from ubn_zoo.layers import functional

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.interop


@pytest.fixture
def installed() -> Iterator[None]:
    with interop.install():
        yield


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = twin(num_classes=0)
        self.head = nn.Linear(512, 3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def loader() -> DataLoader[Any]:
    return DataLoader([(image, index % 3) for index, image in enumerate(images(12))], batch_size=4)


def fit(folder: Path, model: Classifier, *callbacks: Any, epochs: int = 2, **settings: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, loader())
    return trainer


class FrozenAtFirst(lightning.pytorch.callbacks.BaseFinetuning):
    """Records how many statistics and parameters of the backbone's norms change in each epoch."""

    def __init__(self, train_bn: bool, by_hand: bool = False) -> None:
        super().__init__()
        self.train_bn, self.by_hand = train_bn, by_hand
        self.statistics: list[int] = []
        self.parameters: list[int] = []

    def freeze_before_training(self, pl_module: Any) -> None:
        if self.by_hand:
            freeze_ubn(pl_module.backbone)
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            if self.by_hand:
                interop.unfreeze(pl_module.backbone)
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05, train_bn=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.before = statistics(pl_module.backbone)
        self.weights = [p.detach().clone() for layer in ubn_layers(pl_module) for p in layer.parameters()]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        now = [p for layer in ubn_layers(pl_module) for p in layer.parameters()]
        self.statistics.append(moved(self.before, pl_module.backbone))
        self.parameters.append(sum(not torch.equal(a, b) for a, b in zip(self.weights, now, strict=True)))


def test_finetuning_freezes_norms(installed: None, tmp_path: Path) -> None:
    model, callback = Classifier(), FrozenAtFirst(train_bn=False)
    fit(tmp_path, model, callback)
    assert callback.statistics[0] == callback.parameters[0] == 0
    assert min(callback.statistics[1], callback.parameters[1]) > 0
    assert all(layer.track_running_stats for layer in ubn_layers(model))


def test_finetuning_trains_norms_of_a_frozen_backbone(installed: None, tmp_path: Path) -> None:
    model, callback = Classifier(), FrozenAtFirst(train_bn=True)
    convolution = model.backbone.layer1[0].conv1.weight
    before = convolution.detach().clone()
    fit(tmp_path, model, callback, epochs=1)
    assert min(callback.statistics[0], callback.parameters[0]) > 0
    assert torch.equal(convolution, before)


def test_finetuning_by_hand(tmp_path: Path) -> None:
    callback = FrozenAtFirst(train_bn=False, by_hand=True)
    fit(tmp_path, Classifier(), callback)
    assert callback.statistics[0] == callback.parameters[0] == 0
    assert min(callback.statistics[1], callback.parameters[1]) > 0


def test_frozen_parameters_are_reported(tmp_path: Path) -> None:
    from ubn_zoo.layers import overlooked

    overlooked._warned.clear()
    with pytest.warns(UserWarning, match="running statistics and gate still change"):
        fit(tmp_path, Classifier(), FrozenAtFirst(train_bn=False), epochs=1)


def test_weight_averaging_re_estimates_statistics(installed: None, tmp_path: Path) -> None:
    model = Classifier()
    layer = ubn_layers(model)[0]
    seen: list[Tensor] = []

    def see(module: Any, args: tuple[Tensor, ...]) -> None:
        # Lightning re-estimates in one more epoch.
        if module.momentum is None:
            seen.append(args[0].detach())

    handle = layer.register_forward_pre_hook(see)
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    fit(tmp_path, model, averaging, epochs=3)
    handle.remove()
    assert len(seen) == 3
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    similarity = torch.stack([functional.feature_similarity(x, 16) for x in seen]).mean()
    torch.testing.assert_close(layer.feature_similarity, similarity)
    assert (layer.momentum, layer.threshold, layer.similarity_momentum) == (0.1, 0.15, 0.1)
    assert not layer._forward_pre_hooks


def test_sync_batchnorm(installed: None) -> None:
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    model = TorchSyncBatchNorm().apply(Classifier())
    assert all(layer._sync is not None for layer in ubn_layers(model))


def test_sync_batchnorm_without_install_warns() -> None:
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    from ubn_zoo.layers import overlooked

    overlooked._warned.clear()
    with pytest.warns(UserWarning, match="does not synchronize UBN layers"):
        TorchSyncBatchNorm().apply(Classifier())
