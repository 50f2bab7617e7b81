"""UBN in torch and timm functions that look for BatchNorm by class, and in this package's versions."""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import timm.layers
import timm.optim
import timm.utils
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim import swa_utils
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import ubn_zoo
from ubn_zoo import interop
from ubn_zoo.layers import functional, overlooked
from ubn_zoo.layers.split import convert_split_ubn
from ubn_zoo.models.hub_config import describe_model


def small() -> nn.Sequential:
    """A UBN layer, a layer with activation, and a plain BatchNorm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        ubn_zoo.UnifiedBatchNorm2d(4),
        nn.Conv2d(4, 4, 3),
        ubn_zoo.UnifiedBatchNormAct2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    )


def batches(count: int = 3, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1 + torch.randn(6, 3, 9, 9, generator=generator) for _ in range(count)]


def norm_state(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def moved(model: nn.Module) -> int:
    before = norm_state(model)
    model.train()
    model(batches(1)[0])
    return sum(not torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True))


@pytest.fixture
def installed() -> Iterator[None]:
    with interop.install():
        yield


def test_freeze_and_unfreeze() -> None:
    model = small()
    interop.freeze(model)
    assert moved(model) == 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    interop.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model[5]) is nn.BatchNorm2d and not model[1].frozen
    assert moved(model) == 4 + 4 + 3


def test_freeze_of_submodules_does_not_affect_others() -> None:
    model = nn.Sequential(small(), small())
    interop.freeze(model, ["0.1", "1"])
    assert model[0][1].frozen and not model[0][3].frozen and model[1][1].frozen and model[1][3].frozen
    assert [p.requires_grad for p in model[0][1].parameters()] == [False] * 5
    assert all(p.requires_grad for p in model[0][0].parameters())
    assert isinstance(model[1][5], FrozenBatchNorm2d) and type(model[0][5]) is nn.BatchNorm2d
    interop.unfreeze(model, "1")
    assert model[0][1].frozen and not model[1][1].frozen
    with pytest.raises(AttributeError):
        interop.freeze(model, "2")


def test_freeze_of_parameters_only_updates_statistics() -> None:
    model = small()
    interop.freeze(model, include_bn_running_stats=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert moved(model) == 4 + 4 + 3


@pytest.mark.parametrize("gate", [1.0, -1.0])
def test_update_statistics_averages_over_batches(gate: float) -> None:
    model, data = small().double(), [batch.double() for batch in batches()]
    model[1].feature_similarity.fill_(gate)
    model[3].eval()
    interop.update_statistics([(batch, 0) for batch in data], model)
    outputs = [model[0](batch) for batch in data]
    first = model[1]
    torch.testing.assert_close(first.running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    similarities = torch.stack([functional.feature_similarity(y, 16) for y in outputs])
    torch.testing.assert_close(first.feature_similarity, similarities.mean().float())
    assert int(first.num_batches_tracked) == 3
    # Inputs of later layers are normalized with batch statistics, whether the gate is open or closed.
    open_gate = copy.deepcopy(first).train()
    open_gate.threshold = None
    seen = [model[2](open_gate(y)).mean((0, 2, 3)) for y in outputs]
    torch.testing.assert_close(model[3].running_mean, torch.stack(seen).mean(0))
    assert (first.momentum, first.threshold, first.similarity_momentum) == (0.1, 0.15, 0.1)
    assert not first._forward_pre_hooks
    assert model[1].training and not model[3].training


def test_update_statistics_equals_torch_for_batchnorm() -> None:
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ours = copy.deepcopy(theirs)
    swa_utils.update_bn(batches(), theirs)
    interop.update_statistics(batches(), ours)
    assert all(torch.equal(a, b) for a, b in zip(theirs.buffers(), ours.buffers(), strict=True))


def test_update_statistics_changes_nothing_when_it_fails() -> None:
    model = small()
    moved(model)
    before = norm_state(model)
    with pytest.raises(ubn_zoo.InvalidArgumentError, match="yields no batch"):
        interop.update_statistics([], model)
    with pytest.raises(RuntimeError):
        interop.update_statistics([*batches(), torch.zeros(2, 5, 9, 9)], model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.1)
    interop.freeze(model)
    with pytest.raises(ubn_zoo.InvalidArgumentError, match="not frozen"):
        interop.update_statistics(batches(), model)


def test_weight_decay_groups_exclude_depthwise_kernels_and_count_once() -> None:
    twin = timm.create_model("resnet10t_ubn", features_only=True)
    model = nn.Sequential(twin, nn.Linear(8, 8))
    model.again = model[1]
    without, decayed = interop.weight_decay_groups(model, 0.05)
    assert (without["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    grouped = [id(parameter) for parameter in [*without["params"], *decayed["params"]]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    expected = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in expected}
    torch.optim.SGD([without, decayed], lr=0.1)
    _, decayed = interop.weight_decay_groups(model, 0.05, no_weight_decay="1.*")
    assert len(decayed["params"]) == len(expected) - 1
    with pytest.raises(ubn_zoo.InvalidArgumentError, match="weight_decay is -1"):
        interop.weight_decay_groups(model, -1)


def test_weight_decay_groups_ask_the_modules() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self) -> set[str]:
            return {"tokens"}

    without, decayed = interop.weight_decay_groups(nn.Sequential(nn.Linear(2, 2), Tokens()), 0.1)
    assert (len(without["params"]), len(decayed["params"])) == (2, 1)


def decayed_by_timm(model: nn.Module) -> int:
    """Parameters of UBN layers that timm's optimizers would decay."""
    groups = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    layers = [m for m in model.modules() if isinstance(m, ubn_zoo.UnifiedBatchNorm2d)]
    assert layers
    return len({id(p) for layer in layers for p in layer.parameters(recurse=False)} & decayed)


@pytest.mark.parametrize("name", ["resnet10t_ubn", "regnetx_002_ubn"])
def test_timms_optimizers_do_not_decay_feature_extractors(name: str) -> None:
    model = timm.create_model(name, features_only=True)
    assert decayed_by_timm(model) == 0 and decayed_by_timm(copy.deepcopy(model)) == 0


def test_timms_optimizers_do_not_decay_converted_models(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.zeros(2, 2))
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def no_weight_decay(self) -> set[str]:
            return {"tokens"}

    model = ubn_zoo.convert_batchnorm(resnet18(weights=None))
    assert decayed_by_timm(model) == 0
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert decayed_by_timm(other) == 0
        # The names refer to the parameters of the copy, not the original.
        del other.layer1
        assert not any(name.startswith("layer1") for name in other.no_weight_decay())
    names = ubn_zoo.convert_batchnorm(Tokens()).no_weight_decay()
    assert {"tokens", "body.1.weight"} < names and "body.0.weight" not in names


def test_install_is_reversible() -> None:
    import timm.layers.norm_act
    import timm.utils.model

    def functions() -> list[object]:
        return [
            timm.layers.freeze_batch_norm_2d,
            timm.layers.norm_act.freeze_batch_norm_2d,
            timm.utils.model.freeze_batch_norm_2d,
            timm.layers.unfreeze_batch_norm_2d,
            timm.utils.freeze,
            timm.utils.unfreeze,
            timm.utils.distribute_bn,
            timm.layers.convert_sync_batchnorm,
            timm.layers.convert_splitbn_model,
            swa_utils.update_bn,
            nn.SyncBatchNorm.__dict__["convert_sync_batchnorm"],
        ]

    before, ours = functions(), (interop.freeze, interop.unfreeze)
    with interop.install():
        assert not any(old is new for old, new in zip(before, functions(), strict=True))
        with interop.install():
            pass
        assert timm.utils.freeze.__module__.startswith("ubn_zoo.interop")
    assert functions() == before
    assert (interop.freeze, interop.unfreeze) == ours
    interop.uninstall()
    interop.install()
    interop.uninstall()
    assert functions() == before


def test_timm_freezes_and_unfreezes_norms(installed: None) -> None:
    model = small()
    assert timm.layers.freeze_batch_norm_2d(model) is model
    assert moved(model) == 0 and isinstance(model[5], FrozenBatchNorm2d)
    assert model[0].weight.requires_grad and not model[1].weight.requires_grad
    timm.layers.unfreeze_batch_norm_2d(model)
    assert model[1].weight.requires_grad and moved(model) == 4 + 4 + 3


def test_timm_freezes_and_unfreezes_models(installed: None) -> None:
    model = small()
    timm.utils.freeze(model)
    assert moved(model) == 0
    timm.utils.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters()) and moved(model) == 4 + 4 + 3


def test_swa_update_bn_re_estimates(installed: None) -> None:
    model = small()
    expected = copy.deepcopy(model)
    averaged = swa_utils.AveragedModel(model)
    swa_utils.update_bn(batches(), averaged)
    interop.update_statistics(batches(), expected)
    for value, wanted in zip(averaged.module.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(value, wanted)
    swa_utils.update_bn([], nn.Linear(1, 1))


@pytest.mark.parametrize("convert", ["torch", "timm"])
def test_sync_batchnorm_reaches_ubn(installed: None, convert: str) -> None:
    functions = {"torch": nn.SyncBatchNorm.convert_sync_batchnorm, "timm": timm.layers.convert_sync_batchnorm}
    model = small()
    layer = model[1]
    assert functions[convert](model) is model
    assert model[1] is layer and layer._sync is not None and model[3]._sync is not None
    assert type(model[5]) is nn.SyncBatchNorm


def test_split_batchnorm_has_a_layer_for_each_part(installed: None) -> None:
    model = small()
    layer, expected = model[1], copy.deepcopy(model[1])
    assert timm.layers.convert_splitbn_model(model, 2) is model
    assert type(model[5]) is timm.layers.SplitBatchNorm2d and model[1] is layer
    assert [name for name in model.state_dict() if name.startswith(("1.aux_bn.0.", "3.aux_bn.1."))] == [
        f"1.aux_bn.0.{name}" for name in expected.state_dict()
    ]
    x = torch.cat([batches(1)[0], 3 * batches(1, seed=5)[0]])
    y = model[0](x).detach()
    other = copy.deepcopy(expected)
    torch.testing.assert_close(layer(y), torch.cat([expected(y[:6]), other(y[6:])]))
    assert torch.equal(layer.running_var, expected.running_var)
    assert torch.equal(layer.aux_bn[0].running_var, other.running_var)
    torch.testing.assert_close(model.eval()[1](y), expected.eval()(y))
    with pytest.raises(ValueError, match="has 5 samples"):
        layer.train()(y[:5])
    copy.deepcopy(model).train()(x).sum().backward()
    timm.layers.convert_splitbn_model(model, 2)
    assert len(layer.aux_bn) == 1 and layer.aux_bn[0].aux_bn is None


@pytest.fixture
def warned_of_nothing() -> Iterator[None]:
    overlooked._warned.clear()
    yield
    overlooked._warned.clear()


@pytest.mark.parametrize(
    ("walk", "cure", "before"),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, "convert_sync_ubn", ubn_zoo.convert_sync_ubn),
        (timm.layers.convert_sync_batchnorm, "convert_sync_ubn", ubn_zoo.convert_sync_ubn),
        (timm.layers.freeze_batch_norm_2d, "freeze_ubn", ubn_zoo.freeze_ubn),
        (timm.utils.freeze, "freeze_ubn", ubn_zoo.freeze_ubn),
        (timm.layers.convert_splitbn_model, "convert_split_ubn", convert_split_ubn),
    ],
)
def test_functions_that_ignore_ubn_are_reported_once(
    walk: Callable[[nn.Module], object],
    cure: str,
    before: Callable[[nn.Module], nn.Module],
    warned_of_nothing: None,
    recwarn: pytest.WarningsRecorder,
) -> None:
    walk(before(small()))
    list(small().named_modules())
    assert not recwarn.list
    with pytest.warns(UserWarning, match=rf"ubn_zoo\S*\.{cure}\(model\).*interop.install"):
        walk(small())
    walk(small())
    assert not recwarn.list


def test_unfreezing_that_ignores_ubn_is_reported(warned_of_nothing: None) -> None:
    with pytest.warns(UserWarning, match="leaves UBN layers frozen"):
        timm.layers.unfreeze_batch_norm_2d(ubn_zoo.freeze_ubn(small()))


def test_frozen_parameters_with_moving_statistics_are_reported(
    warned_of_nothing: None, recwarn: pytest.WarningsRecorder
) -> None:
    model, x = small().requires_grad_(False), batches(1)[0]
    ubn_zoo.freeze_ubn(small())(x)
    model.eval()(x)
    interop.update_statistics([x], model)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="running statistics and gate still change"):
        model.train()(x)
    model(x)
    assert not recwarn.list


def test_install_leaves_nothing_to_report(
    installed: None, warned_of_nothing: None, recwarn: pytest.WarningsRecorder
) -> None:
    model = small()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    timm.utils.freeze(model)
    timm.utils.unfreeze(model)
    assert not recwarn.list


def _mixed(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = small()
    model[5] = nn.Identity()
    replicas = nn.parallel.DistributedDataParallel(model)
    replicas.sync = nn.SyncBatchNorm(4)  # never called: a CPU cannot run it
    with pytest.warns(UserWarning, match="UBN layers are not"):
        replicas(batches(1)[0])
    dist.destroy_process_group()


def _distribute(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with interop.install():
        for reduce, expected in [(True, 0.5), (False, 0.0)]:
            model = small()
            model[1].feature_similarity.fill_(float(rank))
            model[1].running_mean.fill_(float(rank))
            timm.utils.distribute_bn(model, 2, reduce)
            assert float(model[1].feature_similarity) == expected
            assert torch.equal(model[1].running_mean, torch.full((4,), expected))
    dist.destroy_process_group()


def test_distribute_bn_shares_gates(tmp_path: Path) -> None:
    mp.start_processes(_distribute, (str(tmp_path),), nprocs=2, start_method="fork")


def test_layers_left_out_of_synchronization_are_reported(tmp_path: Path, warned_of_nothing: None) -> None:
    mp.start_processes(_mixed, (str(tmp_path),), nprocs=2, start_method="fork")


SCRIPT = """
import subprocess, sys, timm, torch
from timm.utils import freeze
names = timm.list_models("resnet18_ubn")
with open("seen", "a") as file:
    print(__name__, sys.argv[1:], names, freeze.__module__, file=file)
if sys.argv[1] == "parent":
    subprocess.run([sys.executable, __file__, "child"], check=False)
sys.exit(3)
"""


def test_exec_runs_scripts_and_their_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        ubn_zoo.cli.main(["exec", "script.py", "parent", "--model", "x"])
    assert exit.value.code == 3
    assert (tmp_path / "seen").read_text().splitlines() == [
        "__main__ ['parent', '--model', 'x'] ['resnet18_ubn'] ubn_zoo.interop.libraries",
        "__main__ ['child'] ['resnet18_ubn'] ubn_zoo.interop.libraries",
    ]


def test_exec_runs_modules_and_shows_their_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.py").write_text("import sys\nraise FileNotFoundError(sys.argv[1])\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path), list(sys.argv), timm.utils.freeze
    assert ubn_zoo.cli.main(["exec", "-m", "job", "lost"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "FileNotFoundError: lost" in error
    assert (sys.path, sys.argv, timm.utils.freeze) == before


def test_exec_names_a_missing_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert ubn_zoo.cli.main(["exec", "missing.py"]) == 1
    assert "file missing.py does not exist" in capsys.readouterr().err


def frozen_pair() -> nn.Sequential:
    """torchvision's and timm's frozen layers with random values."""
    model = nn.Sequential(FrozenBatchNorm2d(4), timm.layers.FrozenBatchNormAct2d(4))
    generator = torch.Generator().manual_seed(2)
    for buffer in model.buffers():
        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def test_frozen_batchnorm_converts_into_frozen_ubn() -> None:
    model, x = frozen_pair().train(), batches(1)[0].repeat(1, 2, 1, 1)[:, :4]
    expected = model(x)
    converted = ubn_zoo.convert_batchnorm(model)
    assert [type(layer) for layer in model] == [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d]
    torch.testing.assert_close(converted.train()(x), expected, rtol=1e-5, atol=1e-5)
    before = norm_state(converted)
    converted(x)
    assert all(torch.equal(a, b) for a, b in zip(before, converted.buffers(), strict=True))
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    ubn_zoo.unfreeze_ubn(converted)
    assert all(parameter.requires_grad for parameter in converted.parameters())


def test_convert_batchnorm_takes_filters_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    model = resnet18(weights=None, norm_layer=functools.partial(FrozenBatchNorm2d))
    model.extra = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    with caplog.at_level(logging.INFO, "ubn_zoo"):
        ubn_zoo.convert_batchnorm(model, include=["layer?", "extra"], exclude="layer4.*.bn2")
    assert caplog.messages == [
        "converted to UBN in ResNet: 1 BatchNorm2d, 17 FrozenBatchNorm2d; "
        "left by include and exclude: 3 FrozenBatchNorm2d; left, no UBN variant: 1 GroupNorm"
    ]
    assert isinstance(model.bn1, FrozenBatchNorm2d) and isinstance(model.layer4[0].bn2, FrozenBatchNorm2d)
    assert model.layer4[0].bn1.frozen and not model.extra[0].frozen
    with pytest.raises(ValueError, match="select none of the 3"):
        ubn_zoo.convert_batchnorm(model, include="fc")


@pytest.mark.parametrize("name", ["resnet10t_ubn", "regnetx_002_ubn"])
@pytest.mark.parametrize("training", [False, True])
def test_symbolic_trace_of_a_twin(name: str, training: bool) -> None:
    model = timm.create_model(name, num_classes=3).train(training)
    other = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(model)
    norms = [m for m in model.modules() if isinstance(m, ubn_zoo.UnifiedBatchNorm2d)]
    calls = [graph.get_submodule(str(n.target)) for n in graph.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(module, ubn_zoo.UnifiedBatchNorm2d) for module in calls) == len(norms) > 5
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(graph(x), other(x))
    for value, wanted in zip(graph.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted)


def test_symbolic_trace_of_a_fused_twin() -> None:
    model = ubn_zoo.fuse(timm.create_model("resnet10t_ubn", num_classes=3).eval())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_torchvision_extracts_features_of_a_twin() -> None:
    model = timm.create_model("resnet10t_ubn").eval()
    extractor = create_feature_extractor(model, {"layer2": "features", "layer1.0.bn1": "norm"})
    x = torch.randn(2, 3, 64, 64)
    out = extractor(x)
    seen: list[Tensor] = []
    model.layer2.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    torch.testing.assert_close(out["features"], seen[0])
    assert out["norm"].shape[0] == 2


def test_symbolic_trace_of_the_layer_itself_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"trace torch.nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(ubn_zoo.UnifiedBatchNorm2d(3))


def test_written_configurations_repeat_no_argument_of_transformers() -> None:
    config = describe_model(
        timm.create_model("resnet10t_ubn", num_classes=3), model_config={"label_names": list("abc")}
    )
    assert (config["num_classes"], config["label_names"]) == (3, ["a", "b", "c"])
    assert "num_classes" not in config["model_args"]
