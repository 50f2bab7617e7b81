#!/usr/bin/env python3
"""Run paired experiments, collect their measurements, and make their tables and plots.

    python -m research.experiments run NAME --data-dir DIR [--part 1/2]   # trains the missing runs
    python -m research.experiments collect NAME                           # runs -> results/NAME.csv
    python -m research.experiments cost NAME                              # step times -> results/NAME_cost.csv
    python -m research.experiments report                                 # results/*.csv -> docs/*.png, docs/results.md

`--part K/N` takes every Nth run, so that several processes or machines can share an experiment. An interrupted run
resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from research.experiments import EXPERIMENTS, collect, cost, get_experiment, plan, report
from ubn_zoo.training.run import run

NAMES = [experiment.name for experiment in EXPERIMENTS]


def train(options: argparse.Namespace) -> None:
    """Train the runs of one experiment."""
    experiment = get_experiment(options.name)
    part, parts = (int(number) for number in options.part.split("/"))
    for planned in plan(experiment, str(options.runs))[part - 1 :: parts]:
        done = run(planned.recipe, options.data_dir, options.runs / experiment.name / planned.folder)
        if not done.finished:
            print("stopped; the same command resumes")
            return
        print(f"{experiment.name} {planned.folder}: top-1 {done.metrics[-1].top1:.2f} %", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train the missing runs")
    running.add_argument("--data-dir", type=Path, required=True, help="folder of the data")
    running.add_argument("--part", default="1/1", help="K/N: every Nth run, starting with the Kth")
    collecting = commands.add_parser("collect", help="write results/NAME.csv from finished runs")
    timing = commands.add_parser("cost", help="time a training step of every variant")
    for command in (running, collecting, timing):
        command.add_argument("name", choices=NAMES)
        command.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    reporting = commands.add_parser("report", help="make tables and plots from results/*.csv")
    reporting.add_argument("--docs", type=Path, default=Path("docs"), help="folder that gets them")
    for command in (collecting, timing, reporting):
        command.add_argument("--results", type=Path, default=Path("results"), help="folder of the CSV files")
    options = parser.parse_args(arguments)
    if options.command == "run":
        train(options)
    elif options.command == "cost":
        print(cost(get_experiment(options.name), options.results))
    elif options.command == "collect":
        print(*collect(get_experiment(options.name), options.runs, options.results), sep="\n")
    else:
        print(*report(options.results, options.docs), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
