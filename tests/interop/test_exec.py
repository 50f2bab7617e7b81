"""`ubn-zoo exec` under torchrun, with a script that uses timm like timm's train.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.interop.common import SIBLING, TWIN

pytestmark = pytest.mark.interop

SCRIPT = """
import argparse, pathlib
import timm, torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn, freeze
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--sync-bn", action="store_true")
parser.add_argument("--pretrained-path")
args = parser.parse_args()
dist.init_process_group("gloo")
overlay = {"file": args.pretrained_path}
model = timm.create_model(args.model, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
if args.sync_bn:
    model = convert_sync_batchnorm(model)
optimizer = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=0.01)
model = DistributedDataParallel(model)
generator = torch.Generator().manual_seed(dist.get_rank())
for step in range(3):
    x = torch.randn(4, 3, 64, 64, generator=generator)
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4) % 3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
distribute_bn(model, dist.get_world_size(), True)
state = {name: value.clone() for name, value in model.module.state_dict().items()}
freeze(model.module)
model(x)
assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in state.items())
torch.save(state, f"{dist.get_rank()}.pt")
print("synchronized" if "synchronized=True" in repr(model) else "alone", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("format", ["ubn", "batchnorm"])
def test_training_on_two_ranks(tmp_path: Path, format: str) -> None:
    import timm
    import torch

    (tmp_path / "train.py").write_text(SCRIPT)
    weights = timm.create_model(TWIN if format == "ubn" else SIBLING)
    safetensors.torch.save_file(weights.state_dict(), tmp_path / "weights.safetensors")
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ubn_zoo",
        "exec",
        "train.py",
    ]
    arguments = ["--model", TWIN, "--sync-bn", "--pretrained-path", "weights.safetensors"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments],
        cwd=tmp_path,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["synchronized"] * 2
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
