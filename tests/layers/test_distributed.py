"""Two processes compared with one: synchronized layers, and plain DistributedDataParallel.

The processes are started once per group of cases; every case writes its results to a file, and the tests compare them
with those of the layer and of the reference for the joined batch in one process.
"""

from __future__ import annotations

import copy
import datetime
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ubn_zoo

from . import reference
from .common import OPEN, PARAMETERS, SHUT, gradients, make_layer, random_input, randomize, snapshot, ubn_layers
from .tolerances import OUTPUT, SIMILARITY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo"),
]

F32, F64 = torch.float32, torch.float64
WORLD = 2
TIMEOUT = 120.0  # seconds until deadlocked processes are stopped


@dataclass(frozen=True)
class Case:
    """One training of a synchronized layer: samples per rank, step by step, and the layer's settings."""

    sizes: tuple[tuple[int, int], ...]
    gate: float = OPEN
    picture: tuple[int, int] = (5, 4)
    shared: float = 0.5
    settings: dict[str, Any] = field(default_factory=dict)
    checkpointed: bool | None = None  # reentrant or not; None for no checkpoint
    dtype: torch.dtype = F64
    channels_last: bool = False

    def layer(self) -> nn.Module:
        return make_layer(3, gate=self.gate, dtype=self.dtype, **self.settings)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The joined batch."""
        x, grad_y = random_input((sum(self.sizes[step]), 3, *self.picture), step, self.dtype, self.shared)
        return x - 0.3, grad_y


CASES = {
    "open": Case(((4, 4), (4, 4))),
    "shut": Case(((4, 4), (4, 4)), gate=SHUT),
    "unequal": Case(((3, 5), (6, 1))),
    "unequal, shut": Case(((3, 5), (6, 1)), gate=SHUT),
    "first 16 of 10 + 10": Case(((10, 10),), settings={"similarity_momentum": 1.0}),
    "first 16 of 18 + 4": Case(((18, 4),), settings={"similarity_momentum": 1.0}),
    "first 16 of 3 + 20": Case(((3, 20),), settings={"similarity_momentum": 1.0}),
    "first 5 of 3 + 3": Case(((3, 3),), settings={"similarity_momentum": 1.0, "similarity_samples": 5}),
    "across the gate": Case(
        ((4, 3),) * 5, gate=0.6, shared=0.0, settings={"similarity_momentum": 0.5, "threshold": 0.2}
    ),
    "cumulative average": Case(((4, 3),) * 3, settings={"momentum": None}),
    "no gate": Case(((4, 3),) * 2, gate=SHUT, settings={"threshold": None}),
    "no affine": Case(((4, 3),), settings={"affine": False}),
    "one tap": Case(((4, 3),), settings={"kernel_size": 1}),
    "no calibration": Case(((4, 3),), settings={"center_calibration": False, "scale_calibration": False}),
    "no statistics": Case(((4, 3),) * 2, settings={"track_running_stats": False}),
    "one value per rank": Case(((1, 1),), picture=(1, 1)),
    "nothing on one rank": Case(((4, 0), (0, 4))),
    "checkpointed": Case(
        ((4, 3),) * 4,
        gate=0.6,
        shared=0.0,
        settings={"similarity_momentum": 0.5, "threshold": 0.2},
        checkpointed=False,
    ),
    "checkpointed, reentrant": Case(
        ((4, 3),) * 4,
        gate=0.6,
        shared=0.0,
        settings={"similarity_momentum": 0.5, "threshold": 0.2},
        checkpointed=True,
    ),
    "channels last in float32": Case(((4, 3),) * 2, dtype=F32, channels_last=True),
    "bfloat16": Case(((4, 3),) * 2, dtype=torch.bfloat16),
}


def run_sync_case(case: Case, rank: int) -> dict[str, Any]:
    layer = ubn_zoo.convert_sync_ubn(case.layer())
    steps = []
    for i, sizes in enumerate(case.sizes):
        x, grad_y = (t.split(list(sizes))[rank] for t in case.batch(i))
        if case.channels_last:
            x, grad_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_y))
        layer.zero_grad()
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf) if case.checkpointed is None else checkpoint(layer, leaf, use_reentrant=case.checkpointed)
        y.backward(grad_y)
        steps.append({"y": y.detach(), "x": leaf.grad, "grads": gradients(layer), "state": snapshot(layer)})
    layer.eval()
    # Evaluation shares nothing: one rank alone may do it.
    evaluated = layer(case.batch(0)[0]).detach() if rank == 0 else None
    return {"steps": steps, "eval": evaluated}


def toy_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        ubn_zoo.UnifiedBatchNormAct2d(4, threshold=0.3, similarity_momentum=0.5),
        nn.Conv2d(4, 4, 3),
        ubn_zoo.UnifiedBatchNorm2d(4, threshold=0.3, similarity_momentum=0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return randomize(model, seed, gate=0.5).double()


def toy_batch(step: int, size: int, seed: int) -> Tensor:
    return random_input((size, 3, 8, 8), 100 * seed + step, shared=2.0 * seed)[0] - 0.3


def run_ddp_case(name: str, rank: int) -> dict[str, Any]:
    """Ranks see batches of different size and kind, so their gates differ."""
    model = toy_model(seed=rank if name == "different start" else 0)
    if name == "synchronized":
        model = ubn_zoo.convert_sync_ubn(model)
    if name == "frozen":
        model = ubn_zoo.freeze_ubn(model)
    ddp = DistributedDataParallel(
        model,
        gradient_as_bucket_view=name == "bucket view",
        static_graph=name == "static graph",
        find_unused_parameters=name == "unused parameters",
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    states, grads = [], []
    for step in range(4):
        optimizer.zero_grad()
        if name == "accumulation":
            with ddp.no_sync():
                ddp(toy_batch(step + 50, 3, rank)).square().sum().backward()
        batch = toy_batch(step, 4 if name == "synchronized" else 4 + 2 * rank, rank)
        ddp(batch).square().sum().backward()
        grads.append(gradients(model))
        optimizer.step()
        states.append(snapshot(model))
        if step == 1:
            ddp.eval()
            with torch.no_grad():
                # One rank alone: evaluation of the bare model needs no other rank.
                if rank == 0:
                    model(batch)
            ddp.train()
    return {
        "states": states,
        "grads": grads,
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
    }


DDP_CASES = (
    "plain",
    "different start",
    "accumulation",
    "bucket view",
    "static graph",
    "unused parameters",
    "synchronized",
    "frozen",
)


def run_copied(rank: int) -> dict[str, Any]:
    layer = copy.deepcopy(ubn_zoo.convert_sync_ubn(make_layer(3, dtype=F64)))
    x, _ = random_input((4, 3, 5, 5))
    return {"y": layer(x.split(2)[rank]).detach()}


def run_subgroups(rank: int) -> dict[str, Any]:
    """One group per rank: converted layers behave like plain ones."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    layer = ubn_zoo.convert_sync_ubn(make_layer(3, dtype=F64), groups[rank])
    x, grad_y = random_input((4, 3, 5, 5), rank)
    y = layer(x)
    y.backward(grad_y)
    return {"y": y.detach(), "grads": gradients(layer), "state": snapshot(layer)}


def run_bad_batch(rank: int) -> dict[str, Any]:
    """A step in which the second rank's share holds an Inf, then one of finite values."""
    found = {}
    for name, gate in (("open", OPEN), ("shut", SHUT)):
        layer = ubn_zoo.convert_sync_ubn(make_layer(3, gate=gate, dtype=F64))
        states = [snapshot(layer)]
        for i in range(2):
            x, grad_y = (t.split(2)[rank] for t in random_input((4, 3, 5, 5), i))
            if rank == 1 and i == 0:
                x[1, 0, 2, 2] = float("inf")
            layer(x.clone().requires_grad_()).backward(grad_y)
            states.append(snapshot(layer))
        found[name] = states
    return found


GROUPS: dict[str, dict[str, Callable[[int], dict[str, Any]]]] = {
    "sync": {
        **{name: partial(run_sync_case, case) for name, case in CASES.items()},
        "copied": run_copied,
        "bad batch": run_bad_batch,
        "subgroups": run_subgroups,
    },
    "ddp": {name: partial(run_ddp_case, name) for name in DDP_CASES},
}


def run_cases(group: str, rank: int) -> dict[str, Any]:
    """Runs all cases of a group. The result of a case that fails, which it does on all ranks, is its traceback."""
    results: dict[str, Any] = {}
    for name, run in GROUPS[group].items():
        try:
            results[name] = run(rank)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


def work(rank: int, group: str, folder: str) -> None:
    """Runs in each process: joins the group, runs the cases, saves the results."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    try:
        torch.save(run_cases(group, rank), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_group(group: str, folder: Path) -> list[dict[str, Any]]:
    context = mp.start_processes(work, (group, str(folder)), nprocs=WORLD, join=False, start_method="spawn")
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                pytest.fail(f"the processes of {group!r} wait for each other")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


Results = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of a case, one entry per rank; the processes of its group run on first use."""
    finished: dict[str, Any] = {}

    def get(group: str, case: str) -> list[dict[str, Any]]:
        if group not in finished:
            try:
                finished[group] = run_group(group, tmp_path_factory.mktemp(group))
            except Exception as error:
                finished[group] = error
        if isinstance(finished[group], Exception):
            raise finished[group]
        ranks = [rank[case] for rank in finished[group]]
        for i, rank in enumerate(ranks):
            if "error" in rank:
                pytest.fail(f"rank {i}: {rank['error']}", pytrace=False)
        return ranks

    return get


@pytest.mark.parametrize("gate", ["open", "shut"])
def test_bad_batch_of_one_rank_changes_no_state(gate: str, results: Results) -> None:
    ours, theirs = (rank[gate] for rank in results("sync", "bad batch"))
    start, after_bad, after_good = ours
    for name, value in start.items():
        assert torch.equal(after_bad[name], value), name
        assert torch.equal(theirs[1][name], value), name
        assert torch.equal(theirs[2][name], after_good[name]), name
    assert int(after_good["num_batches_tracked"]) == 1
    assert not torch.equal(after_good["feature_similarity"], start["feature_similarity"])
    assert torch.equal(after_good["running_mean"], start["running_mean"]) == (gate == "shut")


@pytest.mark.parametrize("name", CASES)
def test_synchronized_equals_one_process(name: str, results: Results) -> None:
    case = CASES[name]
    ranks = results("sync", name)
    layer = case.layer()
    parameters, settings = reference.parameters_of(layer), reference.settings_of(layer)
    state = reference.state_of(layer)
    tolerance = OUTPUT[case.dtype].kwargs()
    gates = []
    for i in range(len(case.sizes)):
        expected = reference.run(*case.batch(i), parameters, state, settings)
        state = expected.state
        gates.append(expected.gate)
        steps = [rank["steps"][i] for rank in ranks]
        for key, value in (("y", expected.y), ("x", expected.grad_x)):
            joined = torch.cat([step[key] for step in steps])
            assert joined.dtype == case.dtype
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(
                joined.double() / scale, value / scale, **tolerance, msg=lambda t, k=key: f"{k}: {t}"
            )
        if case.channels_last:
            assert all(step["y"].is_contiguous(memory_format=torch.channels_last) for step in steps)
        for key, value in expected.grads.items():
            total = sum(step["grads"][key].double() for step in steps)
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(
                total.reshape(value.shape) / scale, value / scale, **tolerance, msg=lambda t, k=key: f"{k}: {t}"
            )
        if state.running_mean is None:
            continue
        for step in steps:
            found = step["state"]
            torch.testing.assert_close(found["running_mean"].double(), state.running_mean, rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(found["running_var"].double(), state.running_var, rtol=2e-5, atol=2e-6)
            assert int(found["num_batches_tracked"]) == state.num_batches_tracked
            if settings.threshold is not None:
                torch.testing.assert_close(
                    float(found["feature_similarity"]), state.feature_similarity, **SIMILARITY.kwargs()
                )
        for key, value in steps[0]["state"].items():
            assert torch.equal(value, steps[1]["state"][key]), f"{key} differs between ranks"
    if name in ("across the gate", "checkpointed", "checkpointed, reentrant"):
        assert set(gates) == {True, False}
    evaluated, _, _ = reference.forward(case.batch(0)[0].double(), parameters, state, settings, training=False)
    torch.testing.assert_close(ranks[0]["eval"].double(), evaluated, **tolerance)


def test_ranks_in_separate_groups_share_nothing(results: Results) -> None:
    for rank, result in enumerate(results("sync", "subgroups")):
        layer = make_layer(3, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 5), rank)
        expected = reference.run_like(layer, x, grad_y)
        torch.testing.assert_close(result["y"], expected.y, **OUTPUT[F64].kwargs())
        for name in PARAMETERS:
            torch.testing.assert_close(result["grads"][name], expected.grads[name], **OUTPUT[F64].kwargs())
        torch.testing.assert_close(result["state"]["running_mean"], expected.state.running_mean, **OUTPUT[F64].kwargs())


def test_a_copy_is_synchronized_too(results: Results) -> None:
    layer = make_layer(3, dtype=F64)
    x, grad_y = random_input((4, 3, 5, 5), 0)
    expected = reference.run_like(layer, x, grad_y)
    joined = torch.cat([rank["y"] for rank in results("sync", "copied")])
    torch.testing.assert_close(joined, expected.y, **OUTPUT[F64].kwargs())


@pytest.mark.parametrize("name", DDP_CASES)
def test_ddp_ends_with_equal_parameters_and_buffers(name: str, results: Results) -> None:
    """Each rank gates on its own data, but after every step all ranks have the same model."""
    first, second = results("ddp", name)
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key]), key
    for step, (a, b) in enumerate(zip(first["states"], second["states"], strict=True)):
        for key, value in a.items():
            assert torch.equal(value, b[key]), f"{key} differs between ranks after step {step}"
            assert value.isfinite().all()
    start = snapshot(toy_model())
    moved = any(not torch.equal(value, start[key]) for key, value in first["states"][-1].items())
    assert moved == (name != "frozen")
    layers = len(ubn_layers(toy_model()))
    counts = [int(v) for k, v in first["states"][-1].items() if k.endswith("num_batches_tracked")]
    assert counts == [{"accumulation": 8, "frozen": 0}.get(name, 4)] * layers


def test_synchronized_ddp_has_the_gradients_of_one_process(results: Results) -> None:
    """DDP averages over ranks the gradients that the joined batch sums."""
    ranks = results("ddp", "synchronized")
    model = toy_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(4):
        optimizer.zero_grad()
        batch = torch.cat([toy_batch(step, 4, rank) for rank in range(WORLD)])
        (model(batch).square().sum() / WORLD).backward()
        for rank in ranks:
            found = rank["grads"][step]
            for name, value in gradients(model).items():
                scale = max(1.0, float(value.abs().max()))
                torch.testing.assert_close(
                    found[name] / scale, value / scale, rtol=1e-8, atol=1e-8, msg=lambda t, n=name: f"{n}: {t}"
                )
        optimizer.step()
        for name, value in snapshot(model).items():
            torch.testing.assert_close(ranks[0]["states"][step][name], value, rtol=1e-6, atol=1e-6, msg=name)
