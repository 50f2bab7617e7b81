"""Settings for all tests: no network except loopback, no user files, few threads.

huggingface_hub reads its settings on import, so they are set here, before any test module is imported. The endpoint is
a local server, which answers "no such repository" unless a test adds one.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer

_HOME = Path(tempfile.mkdtemp(prefix="ubn-zoo-tests-"))
(_HOME / "tmp").mkdir()
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

_SERVER = HubServer()
_SERVER.start()
atexit.register(_SERVER.stop)

os.environ.update(
    HF_ENDPOINT=_SERVER.endpoint,
    HF_HOME=str(_HOME / "huggingface"),
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    # Tests that enable Xet use a storage server that does not decompress, and short client timeouts.
    HF_XET_CLIENT_RETRY_BASE_DELAY="10ms",
    HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="2",
    HF_XET_DATA_XORB_COMPRESSION_POLICY="none",
    HF_XET_TELEMETRY_ENABLED="false",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=str(_HOME / "matplotlib"),
    # torchrun leaves a folder of logs behind.
    TMPDIR=str(_HOME / "tmp"),
    TORCH_HOME=str(_HOME / "torch"),
    XDG_CACHE_HOME=str(_HOME / "cache"),
)
for _name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)
# Tests may run in several processes; models this small gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _interpret_triton() -> None:
    """Run Triton kernels on the CPU if there is no GPU.

    Triton reads the setting on import, which timm triggers. Afterwards it is removed, because only our kernel tests
    should use it, and they set it themselves in the same way.
    """
    import torch

    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")


_interpret_triton()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The local Hub server, empty and without faults."""
    _SERVER.reset()
    yield _SERVER
    _SERVER.reset()


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost", socket.gethostname()):
            raise AssertionError(f"a test tried to reach {address}; tests use loopback only")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
