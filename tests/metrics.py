"""A row of metrics, from which tests derive theirs by `dataclasses.replace`."""

from __future__ import annotations

from ubn_zoo.evaluation.metrics import EpochMetrics

ROW = EpochMetrics(
    model="resnet10t",
    norm="ubn",
    seed=0,
    epoch=1,
    step=8,
    lr=0.1,
    train_loss=1.0,
    test_loss=1.0,
    top1=50.0,
    calibration_error=1.0,
    seconds=1.0,
    step_ms=1.0,
    images_per_second=1.0,
    gates=0,
    device="cpu",
    ranks=1,
    threads=1,
    torch="2",
    commit=None,
)
