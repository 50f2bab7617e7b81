"""Compiles the layer's kernels without a GPU, and prints the resources they need; run by `test_kernels.py`.

The launchers run on tensors without values, with recorders instead of kernels, so that the kernels are compiled with
the blocks and types of real launches.

    python compile_kernels.py 90 '{"shape": [8, 64, 56, 56], "dtype": "bfloat16", "kernel": 3, "last": true}' ...
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ubn_zoo.layers.kernels import backward, forward, inference, statistics

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.bool: "i1",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Replaces a kernel and records the arguments of its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[tuple[str, Any, dict[str, Any]]]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)

        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
            self.launches.append((self.name, self.kernel, {**bound, **options}))

        return launch


def launches_of(
    shape: list[int], dtype: str, kernel: int, last: bool, parameters: bool = True, closed: bool = False
) -> list[tuple[str, Any, dict[str, Any]]]:
    """All launches of a training step, of an evaluation and of the fused inference of one layer."""
    launches: list[tuple[str, Any, dict[str, Any]]] = []
    originals = [
        (module, name, value)
        for module in (statistics, forward, backward)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, value in originals:
        setattr(module, name, Recorder(name, value, launches))
    try:
        channels = shape[1]
        kind = getattr(torch, dtype)
        precision = torch.float64 if kind == torch.float64 else torch.float32

        def tensor(*size: int, dtype: torch.dtype = precision) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        x = tensor(*shape, dtype=kind)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        weight = tensor(channels, 1, kernel, kernel) if parameters else None
        vectors = [tensor(channels) if parameters else None for _ in range(4)]
        running = tensor(channels), tensor(channels), tensor(dtype=torch.float32)
        statistics.instance_means(x)
        instance_mean, mean, var, similarity = statistics.statistics(x, vectors[1], 16 if parameters else 0)
        batches, momentum = tensor(dtype=torch.int64), 0.1 if parameters else None
        mean, var, gate = statistics.finalize(mean, var, similarity, *running, batches, momentum, 4, 0.1, 0.15, True)
        for relu in (False, True):
            forward.affine(x, instance_mean, mean, var, weight, *vectors, 1e-5, relu)
            opened = None if closed else gate
            backward.affine_backward(
                x, x if relu else None, x, instance_mean, mean, var, opened, weight, *vectors, 1e-5, True, True
            )
        bias, *rest = vectors
        for slope in (None, mean) if parameters else (mean,):
            # Behind a convolution, which takes the slope, or alone.
            inference.folded_affine(
                x, instance_mean if parameters else None, slope, mean, rest[0], weight, bias, *rest[1:], parameters
            )
    finally:
        for module, name, value in originals:
            setattr(module, name, value)
    return launches


def compiled(kernel: Any, arguments: dict[str, Any], capability: int) -> Any:
    """Compiles a launch as Triton's launcher would."""
    options = {name: arguments[name] for name in _OPTIONS if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            # Allocations are aligned; parameters and buffers of one element are not widened anyhow.
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            assert parameter.annotation_type == "fp64"
            signature[parameter.name] = "fp64"
        else:
            assert parameter.do_not_specialize, parameter.name
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory (spills) per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


def main() -> None:
    capability = int(sys.argv[1])
    for case in map(json.loads, sys.argv[2:]):
        for name, kernel, arguments in launches_of(**case):
            result = compiled(kernel, arguments, capability)
            registers, spilled = resources(result.asm["cubin"])
            print(
                json.dumps(
                    {
                        "case": case,
                        "kernel": name,
                        "registers": registers,
                        "spilled": spilled,
                        "loads": sorted(set(re.findall(r"ld\.global\S*?\.((?:v\d\.)?b\d+)", result.asm["ptx"]))),
                        "shared": result.metadata.shared,
                        "warps": result.metadata.num_warps,
                        "block": [arguments.get(key) for key in ("BLOCK_C", "BLOCK_P", "BLOCK_W", "ROWS", "VECTOR")],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
