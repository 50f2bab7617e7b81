"""torchrun on two hosts, simulated by network namespaces: a lost host, its return, and resuming on fewer hosts.

`python -m pytest -m exhaustive tests/training/test_hosts.py` takes four minutes on two idle cores. It needs util-linux
and iproute2, and root or a kernel that lets users create namespaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import RECIPE, write_image_folder
from ubn_zoo.evaluation.metrics import read_metrics
from ubn_zoo.recipes.schema import dump_recipe
from ubn_zoo.training.checkpoint import newest_snapshot

pytestmark = pytest.mark.exhaustive

ADDRESSES = ("10.213.7.1", "10.213.7.2")
# By default torchrun waits half a minute for a lost host, and as long for one that may still join.
PATIENCE = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,timeout=120"
EPOCHS = 12

# Updates are slow while the file `slow` exists, so that a test can act in the middle of training.
SCRIPT = """
import pathlib, sys, time
from ubn_zoo.training import engine
real, slow = engine._update, pathlib.Path({slow!r})
def update(job, parts):
    real(job, parts)
    if slow.exists():
        time.sleep(0.5)
engine._update = update
from ubn_zoo.cli import main
sys.exit(main())
"""


def _namespace(process: int | str) -> str:
    return str(Path(f"/proc/{process}/ns/net").readlink())


class Hosts:
    """Two connected network namespaces; they disappear with the processes that hold them."""

    def __init__(self) -> None:
        if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
            pytest.skip("network namespaces need unshare, nsenter and ip")
        self._user = os.geteuid() != 0
        create = ["unshare", *(["--map-root-user"] if self._user else []), "--net", "sleep", "infinity"]
        self._holders = [subprocess.Popen(create, stderr=subprocess.DEVNULL)]
        self.started: list[subprocess.Popen[str]] = []
        try:
            self._wait_for_namespace(self._holders[0])
            inner = [*self._inside(0), "unshare", "--net", "sleep", "infinity"]
            self._holders.append(subprocess.Popen(inner, stderr=subprocess.DEVNULL))
            self._wait_for_namespace(self._holders[1])
            self._connect()
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            pytest.skip(f"network namespaces are not permitted here: {error}")

    def _inside(self, host: int) -> list[str]:
        user = ["--user", "--preserve-credentials"] if self._user else []
        return ["nsenter", "--target", str(self._holders[host].pid), *user, "--net"]

    def _wait_for_namespace(self, holder: subprocess.Popen[bytes]) -> None:
        deadline, other = time.monotonic() + 10, {_namespace("self")}
        other |= {_namespace(known.pid) for known in self._holders if known is not holder}
        while time.monotonic() < deadline and holder.poll() is None:
            with contextlib.suppress(OSError):
                if _namespace(holder.pid) not in other:
                    return
            time.sleep(0.01)
        raise OSError("no namespace could be created")

    def _connect(self) -> None:
        commands = ["link add cable type veth peer name cable netns {other}", "link set lo up"]
        for host, address in enumerate(ADDRESSES):
            for command in (*commands[host:], f"addr add {address}/24 dev cable", "link set cable up"):
                words = command.format(other=self._holders[1].pid).split()
                subprocess.run([*self._inside(host), "ip", *words], check=True, capture_output=True)

    def torchrun(self, host: int, log: Path, arguments: list[str], *options: str) -> subprocess.Popen[str]:
        """Start torchrun on a host, as docs/training.md says."""
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500", "--rdzv-id=test"]
        own = [f"--local-addr={ADDRESSES[host]}", f"--rdzv-conf={PATIENCE},is_host={int(host == 0)}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *own, *options]
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "cable"}
        with log.open("a") as file:
            process = subprocess.Popen(
                [*self._inside(host), *launcher, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def processes(self, host: int) -> list[int]:
        """Ids of the processes on a host, except the one that holds its namespace."""
        namespace, found = _namespace(self._holders[host].pid), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if _namespace(path.name) == namespace:
                    found.append(int(path.name))
        return [number for number in found if number != self._holders[host].pid]

    def lose(self, host: int) -> None:
        """Kill everything on a host at once, as a power failure does."""
        for number in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def close(self) -> None:
        for host in range(len(self._holders)):
            with contextlib.suppress(OSError):
                self.lose(host)
        for process in (*self._holders, *self.started):
            process.kill()
            process.wait(timeout=30)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    made.close()


@dataclasses.dataclass
class Run:
    folder: Path
    slow: Path
    logs: tuple[Path, Path]
    arguments: list[str]

    def starts(self) -> list[dict[str, int]]:
        path = self.folder / "environment.json"
        found: list[dict[str, int]] = json.loads(path.read_text())["starts"] if path.exists() else []
        return found

    def updates(self) -> int:
        snapshot = newest_snapshot(self.folder / "checkpoints")
        return 0 if snapshot is None else snapshot.updates

    def wait_for(self, condition: Callable[[], bool], seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n\n".join(log.read_text()[-6000:] for log in self.logs)
            time.sleep(0.1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    images = write_image_folder(tmp_path / "images", train=32, test=16)
    recipe = dataclasses.replace(RECIPE, epochs=EPOCHS, checkpoint_steps=1, sync_norm=True)
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    slow, script, folder = tmp_path / "slow", tmp_path / "train.py", tmp_path / "run"
    script.write_text(SCRIPT.format(slow=str(slow)))
    slow.touch()
    where = ["--recipe", str(tmp_path / "mine.yaml"), "--data-dir", str(images), "--output", str(folder)]
    return Run(folder, slow, (tmp_path / "0.log", tmp_path / "1.log"), [str(script), "train", *where])


def assert_complete(run: Run) -> None:
    assert [row.epoch for row in read_metrics(run.folder / "metrics.csv")] == list(range(1, EPOCHS + 1))
    assert (run.folder / "model.safetensors").is_file()


def test_a_host_is_lost_and_comes_back(hosts: Hosts, run: Run) -> None:
    """Elastic: the other host resumes from the newest checkpoint, and both do once the lost one is back."""
    options = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5")
    first = hosts.torchrun(0, run.logs[0], run.arguments, *options)
    hosts.torchrun(1, run.logs[1], run.arguments, *options)
    run.wait_for(lambda: run.updates() >= 2)
    assert [start["ranks"] for start in run.starts()][-1] == 2

    hosts.lose(1)
    before, count = run.updates(), len(run.starts())
    run.wait_for(lambda: len(run.starts()) > count and run.updates() >= before + 2)
    assert run.starts()[-1]["ranks"] == 1
    assert run.starts()[-1]["updates"] >= before

    count = len(run.starts())
    second = hosts.torchrun(1, run.logs[1], run.arguments, *options)
    run.wait_for(lambda: len(run.starts()) > count)
    assert run.starts()[-1]["ranks"] == 2
    assert run.starts()[-1]["updates"] > before
    run.slow.unlink()
    run.wait_for(lambda: first.poll() is not None and second.poll() is not None)
    assert (first.returncode, second.returncode) == (0, 0), run.logs[0].read_text()[-3000:]
    assert_complete(run)


def test_a_fixed_number_of_hosts_waits_for_the_lost_one(hosts: Hosts, run: Run) -> None:
    """The command in docs/training.md: nothing is lost, and the run continues once the host is back."""
    options = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3")
    first = hosts.torchrun(0, run.logs[0], run.arguments, *options)
    hosts.torchrun(1, run.logs[1], run.arguments, *options)
    run.wait_for(lambda: run.updates() >= 2)
    hosts.lose(1)
    run.wait_for(lambda: "lost another rank" in run.logs[0].read_text())
    before, count = run.updates(), len(run.starts())
    second = hosts.torchrun(1, run.logs[1], run.arguments, *options)
    run.slow.unlink()
    run.wait_for(lambda: first.poll() is not None and second.poll() is not None)
    assert (first.returncode, second.returncode) == (0, 0), run.logs[0].read_text()[-3000:]
    assert [start["ranks"] for start in run.starts()] == [2] * (count + 1)
    assert run.starts()[-1]["updates"] >= before
    assert_complete(run)


def test_one_host_resumes_what_two_began(hosts: Hosts, run: Run) -> None:
    """SIGTERM to the launchers, as sent by schedulers, saves a checkpoint; the same command resumes on one host."""
    options = ("--nnodes=2", "--nproc-per-node=1")
    both = [hosts.torchrun(host, run.logs[host], run.arguments, *options) for host in range(2)]
    run.wait_for(lambda: run.updates() >= 2)
    for process in both:
        process.send_signal(signal.SIGTERM)
    run.wait_for(lambda: all(process.poll() is not None for process in both), 60.0)
    reached = run.updates()
    assert 2 <= reached < 4 * EPOCHS
    run.slow.unlink()
    done = subprocess.run([sys.executable, *run.arguments], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert [(start["ranks"], start["updates"]) for start in run.starts()] == [(2, 0), (1, reached)]
    assert_complete(run)
