"""Show the progress of a run.

Works from any shell, while a run is in progress or after it has ended.

Examples:
    ubn-zoo status runs/photos
    ubn-zoo status runs/photos runs/digits --json

The state is running, finished, interrupted (by a signal, or killed), failed, or unknown. Unknown means that the process
is on another host or in another container and has written nothing for five minutes. report.html in the run's folder
shows the curves.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the status of each run."""
    from ubn_zoo.training.status import describe_run

    found = [describe_run(folder) for folder in options.runs]
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return 0
    for described in found:
        print(f"{described['folder']}: {described['state']}")
        for label, value in _lines(described).items():
            if value:
                print(f"  {label:9}  {value}")
    return 0


def _lines(run: dict[str, Any]) -> dict[str, str | None]:
    from ubn_zoo.utils.progress import duration

    def number(name: str, form: str, before: str = "", after: str = "") -> str | None:
        return None if run[name] is None else f"{before}{run[name]:{form}}{after}"

    updates = f" of {run['updates']:,} ({100 * run['update'] / run['updates']:.0f} %)" if run["updates"] else ""
    loss = [number("train_loss", ".4f", "loss "), number("lr", ".3g", "lr ")]
    process, last, best = run["process"], run["metrics"], run["best"]
    lines = {
        "why": run["message"],
        "model": f"{run['model']} {run['norm']}, seed {run['seed']}",
        "epoch": f"{run['epoch']} of {run['epochs']} done, update {run['update']:,}{updates}",
        "rate": number("images_per_second", ",.0f", after=" images/s"),
        "elapsed": None if run["elapsed"] is None else duration(run["elapsed"]),
        "left": None if run["left"] is None else duration(run["left"]),
        "training": ", ".join(part for part in loss if part),
        "metrics": None if last is None else _metrics(last),
        "best": None if best is None else f"epoch {best['epoch']}, {best['metric']} {best['value']:.6g}, in best/",
        "process": None if process is None else f"{process['pid']} on {process['host']}",
    }
    if run["written"] is not None:
        lines["process"] = f"{lines['process']}, last update {duration(max(time.time() - run['written'], 0.0))} ago"
    return lines


def _metrics(row: dict[str, Any]) -> str:
    ema = "" if row["ema_top1"] is None else f" (EMA {row['ema_top1']:.2f} %)"
    return f"epoch {row['epoch']}: top-1 {row['top1']:.2f} %{ema}, loss {row['test_loss']:.4f}"
