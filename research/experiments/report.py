"""The page of all grids that have results, and their figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from research.experiments.grid import Cell, Grid, list_grids, load_grid, settings
from research.experiments.inference import holm, interval, mcnemar, paired_p, runs_needed
from research.experiments.tables import Results, load
from ubn_zoo.evaluation.plots import STYLES, draw_comparison, draw_similarity_comparison, new_figure, save

__all__ = ["INTRODUCTION", "draw", "figures", "markdown", "page", "report", "section"]

INTRODUCTION = """\
# Results

<!-- Written by `python -m research.experiments report` from results/*.csv; edit research/experiments instead. -->

Each section is a grid of `research/experiments/grids`. All variants of a seed share the recipe, the initial weights of
the convolutions, the order of the images and the augmentation. [Run your own grid](training.md#experiments) in the same
way.

- **Top-1** is the accuracy after the last epoch, never that of the best epoch: mean ± standard deviation over seeds. A
  section says which images it is measured on.
- **Difference** is the difference to the first variant in points, taken seed by seed, with its 95 % confidence interval
  (Student's t). **p** is that of the paired t-test, adjusted for the number of variants by Holm's method.
- **McNemar** counts the seeds in which an exact McNemar test (p < 0.05) finds that the two models are not right equally
  often on the same images.
- **Seeds needed** is the number of seeds that would show a difference of the stated size with 80 % probability, given
  the spread seen here.
- **Mean similarity** is the cosine similarity between features of different images, averaged over norm layers, after
  the last epoch of the first seed. **Gates open** counts the layers that use batch statistics, for each seed.
- **Step** is the time of a training step divided by that of the first variant, both measured in one run on an idle
  machine (`python -m research.experiments cost GRID`).

Schedules are short, so that one or two CPU cores can run them. These results describe early training of small models;
a longer run may end differently.
"""


GATES = """\
## Which gates close

A gate compares a running average of the cosine similarity between samples of a batch with a threshold (0.15). Above
it, features are condensed: the layer normalizes with batch statistics. Below it, the gate is closed: the layer
normalizes with running statistics and stops updating them.

![Running similarity of every norm layer, and which gates are closed](gates.png)

- Most gates keep what they decided in the first epoch. In ResNet-10-T and RegNetX-200MF every gate but the first stays
  open, so UBN there is nearly UBN without a gate. In MobileNetV3-small a third close, mostly behind the layers that
  widen a block, and some cross the threshold again.
- With batches of 4 the similarity of the deepest layers, which see 1x1 maps, is negative: BatchNorm divides by the
  spread of four values there, and the gate stops it.
- Gates are meant to be open early in training, while features are condensed, and to close later. These short runs do
  not show that: no gate that was open after the first epoch of RegNetX-200MF or ResNet-10-T closes later, and the
  similarity of RegNetX's last layers rises from 0.5 to 0.78.

From the first seed of the grids above, UBN with threshold 0.15: `running`, `threshold` and `gate` in
`results/GRID_similarity.csv`; repeat: `python -m research.experiments report`.
"""


def _spread(values: Sequence[float]) -> str:
    """Mean, with the standard deviation over seeds where there are several."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _reached(results: Results, label: str) -> dict[int, float]:
    """The reported top-1 of each seed: that of the test images, or the held-out accuracy after the last epoch."""
    if label in results.tested:
        return {row.seed: row.top1 for row in results.tested[label]}
    return {run[-1].seed: run[-1].top1 for run in results.runs[label]}


def _differences(results: Results, label: str, baseline: str) -> list[float]:
    before = _reached(results, baseline)
    return [top1 - before[seed] for seed, top1 in _reached(results, label).items() if seed in before]


def _labels(grid: Grid, cell: Cell, results: Results) -> dict[str, str]:
    """Labels of a cell's rows in the tables, by variant; only those with results."""
    found = {variant: cell.label(variant) for variant in grid.variants}
    return {variant: label for variant, label in found.items() if label in results.runs}


def markdown(grid: Grid, cell: Cell, results: Results) -> str:
    """Format the table of one cell.

    Args:
        grid: The grid.
        cell: A combination of its models and varied settings.
        results: Its measurements.
    """
    labels = _labels(grid, cell, results)
    columns = ["", "seeds", *grid.tune, "top-1 (%)", "difference [95 % CI]", "p", "McNemar"]
    columns += [
        f"seeds needed for {grid.claim:g} point{'' if grid.claim == 1 else 's'}",
        "loss",
        "calibration error (%)",
        "mean similarity",
    ]
    columns += ["gates open", "step"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    baseline, *others = labels.values()
    raw = {label: paired_p(_differences(results, label, baseline)) for label in others}
    adjusted = holm({label: p for label, p in raw.items() if p is not None})
    for variant, label in labels.items():
        runs, tested = results.runs[label], results.tested.get(label, ())
        last = [run[-1] for run in runs]
        tuned = dict(part.split("=", 1) for part in tested[0].choice.split()) if tested else {}
        difference = tests = needed = p = ""
        if label != baseline:
            pairs = _differences(results, label, baseline)
            difference = _difference(pairs)
            if len(pairs) > 1:
                needed = str(runs_needed(statistics.stdev(pairs), grid.claim))
                p = _p(adjusted[label])
            if tested:
                found = sum(mcnemar(row.only_baseline, row.only_variant) < 0.05 for row in tested)
                tests = f"{found} of {len(tested)}"
        probed = [row.similarity for row in results.layers.get(label, ()) if row.epoch == last[0].epoch]
        gates = [f"{row.gates_open}/{row.gates}" for row in last if row.gates]
        losses = [row.loss for row in tested] or [row.test_loss for row in last]
        cells = [variant, str(len(runs)), *(tuned.get(key, "") for key in grid.tune)]
        cells += [f"**{_spread(list(_reached(results, label).values()))}**", difference, p, tests, needed]
        cells += [_spread(losses), _spread([row.calibration_error for row in last])]
        cells += [f"{statistics.fmean(probed):.2f}" if probed else "", ", ".join(gates)]
        cells += [f"{results.steps[label]:.2f}" if label in results.steps else ""]
        lines.append(f"| {' | '.join(cells)} |")
    further = [
        f"- {first} against {second}: {_difference(pairs)}" + (f", p = {p:.3f} (not adjusted)" if p is not None else "")
        for first, second in grid.compare
        if first in labels and second in labels
        for pairs in [_differences(results, labels[first], labels[second])]
        for p in [paired_p(pairs)]
    ]
    return "\n".join(lines) + "\n" + "".join(f"\n{line}" for line in further) + ("\n" if further else "")


def _difference(pairs: Sequence[float]) -> str:
    mean, half = statistics.fmean(pairs), interval(pairs)
    return f"{mean:+.2f}" + ("" if half is None else f" [{mean - half:+.2f}, {mean + half:+.2f}]")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def section(grid: Grid, results: Results) -> str:
    """Format the section of a grid: its note, a table and figures for each cell, and how to repeat it."""
    parts = [f"## {grid.title}\n", f"{grid.note}\n" if grid.note else ""]
    pictures = figures(grid, results)
    for cell in grid.cells():
        if not _labels(grid, cell, results):
            continue
        if cell.settings:
            parts.append(f"### {str(cell)[0].upper()}{str(cell)[1:]}\n")
        parts.append(markdown(grid, cell, results))
    parts += [f"![{caption}]({name})\n" for name, caption in pictures.items()]
    first = next(iter(results.runs.values()))[0][-1]
    images = "Top-1 is that of the held-out images, by which settings were compared too."
    if grid.test and results.tested:
        count = next(iter(results.tested.values()))[0].images
        held_out = "the data's held-out images"
        if grid.hold_out is not None:
            held_out = f"{100 * grid.hold_out:g} % of the training images, held out of training"
        seeds = f"{grid.tune_seeds} seed{'' if grid.tune_seeds == 1 else 's'}"
        tuned = f" {_listed(list(grid.tune))} chosen on {held_out} with {seeds}." if grid.tune else ""
        images = f"Top-1 and loss are those of {count:,} test images, predicted once at the end.{tuned}"
    dates = sorted({row.date for rows in results.tested.values() for row in rows})
    when = f", {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}" if dates else ""
    parts.append(
        f"{images} Recipe `{Path(grid.recipe).stem}`{_changes(grid)}, {first.epoch} epochs, {first.threads} thread of "
        f"{first.device}, torch {first.torch}, commits {_commits(results)}{when}. Table "
        f"[results/{grid.name}.csv](../results/{grid.name}.csv); repeat: "
        f"`python -m research.experiments run {grid.name}{'' if grid.data else ' --data-dir DIR'}`, "
        f"then `collect {grid.name}`.\n"
    )
    return "\n".join(part for part in parts if part)


def _listed(names: Sequence[str]) -> str:
    return f"{' and '.join(f'`{name}`' for name in names)} {'was' if len(names) == 1 else 'were'}"


def _changes(grid: Grid) -> str:
    changed = ", ".join(f"`{setting}`" for setting in settings(grid.settings))
    return f" with {changed}" if changed else ""


def _commits(results: Results) -> str:
    found = {row.commit[:9] for runs in results.runs.values() for run in runs for row in run if row.commit}
    return ", ".join(sorted(found)) or "not known"


def figures(grid: Grid, results: Results) -> dict[str, str]:
    """Names of a grid's figures and their captions: learning curves and similarity, or accuracies on test images."""
    if results.tested:
        return {f"{grid.name}.png": grid.title}
    return {
        f"{grid.name}.png": grid.title,
        **({f"{grid.name}_similarity.png": "Feature similarity"} if results.layers else {}),
    }


def draw(grid: Grid, results: Results, folder: str | Path) -> tuple[Path, ...]:
    """Draw a grid's figures.

    Args:
        grid: The grid.
        results: Its measurements.
        folder: Folder that gets them.
    """
    written = [Path(folder) / name for name in figures(grid, results)]
    if results.tested:
        _draw_tested(grid, results, written[0])
        return tuple(written)
    draw_comparison(results.runs, written[0], title=grid.title)
    if results.layers:
        draw_similarity_comparison(results.layers, written[1], title=grid.title)
    return tuple(written)


def _draw_tested(grid: Grid, results: Results, path: Path) -> None:
    """A panel per cell: every seed's accuracy as a point, each variant's mean as a line."""
    cells = [cell for cell in grid.cells() if _labels(grid, cell, results)]
    figure = new_figure(max(7.0, 2.6 + 2.2 * len(cells)), 1.4 + 0.36 * len(grid.variants))
    figure.suptitle(grid.title, fontsize=11)
    panels = figure.subplots(1, len(cells), squeeze=False, sharey=True)[0]
    names = list(grid.variants)
    for axes, cell in zip(panels, cells, strict=True):
        for variant, label in _labels(grid, cell, results).items():
            place, style = names.index(variant), STYLES[names.index(variant) % len(STYLES)]
            values = list(_reached(results, label).values())
            axes.plot(values, [place] * len(values), style.marker, color=style.color, alpha=0.55, markersize=6)
            axes.vlines(statistics.fmean(values), place - 0.32, place + 0.32, color=style.color, linewidth=2)
        axes.set_title(str(cell), fontsize=10)
        axes.set_xlabel("test top-1 (%)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    save(figure, path)


_GATES = {
    "cifar10_mobilenet": "MobileNetV3-small 0.5, batch 128",
    "cifar10_resnet": "ResNet-10-T, batch 128",
    "cifar10_regnet_long": "RegNetX-200MF, batch 128",
    "small_batch_digits": "MobileNetV3-small 0.5, batch 4",
}


def draw_gates(results: str | Path, path: Path) -> tuple[Path, ...]:
    """Draw the running similarity of each layer in the committed grids' UBN runs, and which gates close."""
    found = {
        title: load(load_grid(name), results).layers["UBN"]
        for name, title in _GATES.items()
        if (Path(results) / f"{name}.csv").is_file()
    }
    if not found:
        return ()
    figure = new_figure(11, 3.1 * ((len(found) + 1) // 2))
    panels = figure.subplots((len(found) + 1) // 2, 2, squeeze=False).flat
    for axes, (title, rows) in zip(panels, found.items(), strict=False):
        last = max(row.epoch for row in rows)
        for epoch in range(1, last + 1):
            layers = [row for row in rows if row.epoch == epoch]
            values = [row.running or 0.0 for row in layers]
            axes.plot([row.depth for row in layers], values, color="#0072B2", alpha=0.25 + 0.75 * epoch / last / 1.2)
            if epoch == last:
                closed = [row for row in layers if row.gate == "closed"]
                places, heights = [row.depth for row in closed], [row.running or 0.0 for row in closed]
                axes.plot(places, heights, "x", color="#D55E00", label="closed after the last epoch")
        axes.axhline(rows[0].threshold or 0.0, color="0.3", linewidth=0.8, label="threshold")
        axes.set_title(f"{title}: {len(closed)} of {len(layers)} gates closed", fontsize=10)
        axes.set_xlabel("norm layer, from input to output; darker lines are later epochs", fontsize=8)
        axes.set_ylabel("running similarity")
        axes.legend(fontsize=8)
    return (save(figure, path),)


def _measured(results: str | Path) -> list[Grid]:
    grids = [load_grid(name) for name in list_grids() if (Path(results) / f"{name}.csv").is_file()]
    # Grids with test images first: nothing was chosen by the images that they report.
    return sorted(grids, key=lambda grid: not grid.test)


def page(results: str | Path) -> str:
    """The page of all committed grids that have results, in Markdown.

    Args:
        results: Folder of the tables that `collect` wrote.
    """
    return _page(_measured(results), results)


def _page(grids: Sequence[Grid], results: str | Path) -> str:
    gates = GATES if any(grid.name in _GATES for grid in grids) else ""
    return "\n".join(
        [INTRODUCTION, *(section(grid, load(grid, results)) for grid in grids), *([gates] if gates else [])]
    )


def report(results: str | Path, docs: str | Path, grids: Sequence[Grid] = ()) -> tuple[Path, ...]:
    """Write the page of grids and their figures.

    Args:
        results: Folder of the tables that `collect` wrote.
        docs: Folder that gets ``results.md`` and the figures.
        grids: The grids; by default all committed ones that have results.

    Returns:
        The files written.
    """
    found = list(grids) or _measured(results)
    path = Path(docs) / "results.md"
    path.write_text(_page(found, results), encoding="utf-8")
    pictures = [draw(grid, load(grid, results), docs) for grid in found]
    gates = draw_gates(results, Path(docs) / "gates.png") if not grids else ()
    return (path, *(picture for drawn in pictures for picture in drawn), *gates)
