"""Run a Python script with UBN support added.

In the script, timm can create the zoo's models. Operations that timm, torch, Lightning and other libraries apply to
BatchNorm classes (freeze, synchronize, re-estimate statistics) also apply to UBN layers: see `ubn_zoo.interop.install`.

Examples:
    ubn-zoo exec train.py --model resnet10t_ubn --data-dir photos --sync-bn
    ubn-zoo exec -m my_project.train --model resnet50_ubn
    torchrun --nproc-per-node 8 -m ubn_zoo exec train.py --model resnet50_ubn

Child processes of the script get the same support when they import timm, unless they start with another PYTHONPATH or
with Python's options -E, -I or -S.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a module with -m")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")


def run(options: argparse.Namespace) -> int:
    """Run the script as Python would, in this process."""
    from ubn_zoo import interop
    from ubn_zoo.errors import InvalidArgumentError, UbnZooError

    script = Path(options.script)
    if not options.module and not script.exists():
        raise InvalidArgumentError(f"file {options.script} does not exist; use -m to run a module by name")
    startup = str(Path(__file__).parent / "_startup")
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([startup, inherited] if inherited else [startup])
    before = sys.argv, list(sys.path)
    sys.argv = [options.script, *options.arguments]
    # Python puts the script's folder first on the path, and the current folder for a module.
    sys.path[0] = str(Path.cwd() if options.module else script.resolve().parent)
    try:
        with interop.install():
            if options.module:
                runpy.run_module(options.script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(options.script, run_name="__main__")
    except BrokenPipeError:
        raise
    except (OSError, UbnZooError):
        # Print errors of the script with their traceback, which `main` would omit.
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before
        if inherited is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = inherited
    return 0
