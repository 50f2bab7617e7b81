"""Plots of runs are valid PNG files that change with their data."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.metrics import ROW
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity, write_metrics, write_similarity
from ubn_zoo.evaluation.plots import draw_comparison, draw_run, draw_similarity_comparison

pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, of the extra ubn-zoo[quickstart]")


def metrics(
    epochs: int, *, norm: str = "ubn", seed: int = 0, gain: float = 0.0, ema: bool = False
) -> list[EpochMetrics]:
    return [
        dataclasses.replace(
            ROW,
            model="regnetx_002",
            norm=norm,
            seed=seed,
            epoch=epoch,
            step=100 * epoch,
            lr=0.1 / epoch,
            train_loss=2 / epoch + 0.05 * seed,
            test_loss=2.1 / epoch,
            top1=80 - 50 / epoch + seed + gain,
            calibration_error=3.0,
            ema_test_loss=1.9 / epoch if ema else None,
            ema_top1=82 - 50 / epoch if ema else None,
            seconds=10.0 + seed,
            step_ms=20.0,
            images_per_second=3000.0,
        )
        for epoch in range(1, epochs + 1)
    ]


def similarity(epochs: int, layers: int, *, gates: bool = True, shift: float = 0.0) -> list[LayerSimilarity]:
    rows = []
    for epoch in range(epochs + 1):
        for depth in range(layers):
            value = math.exp(-3 * depth / layers) / (1 + epoch / 10) - 0.05 + shift
            gate = ("open" if value > 0.15 else "closed") if gates else None
            rows.append(
                LayerSimilarity(
                    epoch=epoch,
                    layer=f"stage{depth % 4}.block{depth}.bn",
                    depth=depth,
                    similarity=value,
                    running=value if gates else None,
                    threshold=0.15 if gates else None,
                    gate=gate,
                )
            )
    return rows


def look(path: Path) -> tuple[tuple[int, int], bytes]:
    """Size and pixels of a PNG file, which must not be blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = image.convert("RGB")
        assert all(darkest < 100 and brightest == 255 for darkest, brightest in pixels.getextrema())
        return image.size, pixels.tobytes()


def draw(
    folder: Path, rows: Sequence[EpochMetrics], layers: Sequence[LayerSimilarity] | None = None
) -> dict[str, tuple[tuple[int, int], bytes]]:
    folder.mkdir()
    write_metrics(folder / "metrics.csv", rows)
    if layers is not None:
        write_similarity(folder / "similarity.csv", layers)
    written = draw_run(folder)
    tables = {"metrics.csv"} | ({"similarity.csv"} if layers is not None else set())
    assert {path.name for path in folder.iterdir()} == {path.name for path in written} | tables
    assert all(path.parent == folder for path in written)
    return {path.name: look(path) for path in written}


def test_plots_of_a_run_are_written(tmp_path: Path) -> None:
    pictures = draw(tmp_path / "run", metrics(5), similarity(5, 44))
    assert list(pictures) == ["loss_accuracy.png", "learning_rate.png", "similarity.png"]


def test_without_similarity_there_is_no_similarity_plot(tmp_path: Path) -> None:
    names = ["loss_accuracy.png", "learning_rate.png"]
    assert list(draw(tmp_path / "absent", metrics(2))) == names
    assert list(draw(tmp_path / "empty", metrics(2), [])) == names


def test_plots_change_only_with_their_data(tmp_path: Path) -> None:
    rows, layers = metrics(3, ema=True), similarity(3, 6)
    first = draw(tmp_path / "first", rows, layers)
    assert draw(tmp_path / "again", rows[::-1], layers[::-1]) == first
    last = rows[-1]
    changes: dict[str, tuple[Sequence[EpochMetrics], Sequence[LayerSimilarity]]] = {
        f"loss_accuracy.png/{field}": ([*rows[:-1], dataclasses.replace(last, **{field: value})], layers)
        for field, value in {
            "top1": 60.0,
            "ema_top1": 62.0,
            "train_loss": 1.0,
            "test_loss": 1.0,
            "ema_test_loss": 1.2,
        }.items()
    }
    changes["learning_rate.png/lr"] = ([*rows[:-1], dataclasses.replace(last, lr=0.05)], layers)
    changes["similarity.png/similarity"] = (rows, [*layers[:-1], dataclasses.replace(layers[-1], similarity=0.9)])
    changes["similarity.png/gate"] = (rows, [*layers[:-1], dataclasses.replace(layers[-1], gate="open")])
    for change, (changed_rows, changed_layers) in changes.items():
        name, _, field = change.partition("/")
        pictures = draw(tmp_path / f"{field}", changed_rows, changed_layers)
        assert {other for other, picture in pictures.items() if picture != first[other]} == {name}, field


def test_gates_are_drawn_if_there_are_any(tmp_path: Path) -> None:
    with_gates = draw(tmp_path / "gates", metrics(2), similarity(2, 6))["similarity.png"][0]
    without = draw(tmp_path / "none", metrics(2), similarity(2, 6, gates=False))["similarity.png"][0]
    assert with_gates[0] > 1.4 * without[0]
    mixed = similarity(2, 6)
    mixed[0] = dataclasses.replace(mixed[0], running=None, threshold=None, gate=None)
    assert draw(tmp_path / "mixed", metrics(2), mixed)["similarity.png"][0] == with_gates


@pytest.mark.parametrize(("epochs", "layers"), [(1, 1), (1, 60), (300, 5), (41, 130)])
def test_any_size_of_run_can_be_drawn(tmp_path: Path, epochs: int, layers: int) -> None:
    rows = [row for row in similarity(epochs, layers) if row.epoch > 0 or epochs > 1]
    pictures = draw(tmp_path / "run", metrics(epochs, ema=True), rows)
    assert all(height <= 1300 for (_, height), _ in pictures.values())


def test_a_single_epoch_is_not_an_empty_plot(tmp_path: Path) -> None:
    size, pixels = draw(tmp_path / "run", metrics(1))["loss_accuracy.png"]
    blue = (0x00, 0x72, 0xB2)
    drawn = sum(tuple(pixels[i : i + 3]) == blue for i in range(0, len(pixels), 3))
    # The points in both panels and in the legend, each several pixels wide.
    assert drawn > 150, size


@pytest.mark.parametrize("threshold", [None, -1.0, 0.0, 1.0, 2.0])
def test_thresholds_outside_of_the_scale(tmp_path: Path, threshold: float | None) -> None:
    rows = [dataclasses.replace(row, threshold=threshold) for row in similarity(1, 3)]
    draw(tmp_path / "run", metrics(1), rows)


def test_layers_of_some_epochs_only(tmp_path: Path) -> None:
    rows = [row for row in similarity(20, 4) if row.epoch in (0, 10, 15) and (row.epoch, row.depth) != (10, 2)]
    draw(tmp_path / "run", metrics(20), rows)


def test_a_run_without_rows(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", [])
    with pytest.raises(ValueError, match=r"metrics\.csv: received no rows; valid: at least one epoch"):
        draw_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv"):
        draw_run(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def group(gain: float, epochs: int = 3, seeds: int = 3) -> list[list[EpochMetrics]]:
    return [metrics(epochs, seed=seed, gain=gain) for seed in range(seeds)]


Drawing = Callable[[Any, Path], None]


def compare_runs(groups: Any, path: Path, **settings: Any) -> None:
    draw_comparison(groups, path, title="runs", **settings)


def compare_similarity(groups: Any, path: Path) -> None:
    draw_similarity_comparison(groups, path, title="similarity")


def examples() -> dict[str, tuple[Drawing, dict[str, Any], dict[str, Any]]]:
    """For every comparison: the drawing function, groups, and groups in which one value differs."""
    runs, layers = {"BatchNorm": group(0), "UBN": group(3)}, {"BatchNorm": similarity(2, 8), "UBN": similarity(2, 8)}
    lower = [*similarity(2, 8)[:-1], dataclasses.replace(similarity(2, 8)[-1], similarity=0.4)]
    return {
        "runs": (compare_runs, runs, {**runs, "UBN": [metrics(3, gain=9), *group(3)[1:]]}),
        "similarity": (compare_similarity, layers, {**layers, "UBN": lower}),
    }


@pytest.mark.parametrize("kind", examples())
def test_comparisons_change_only_with_their_data(tmp_path: Path, kind: str) -> None:
    function, groups, changed = examples()[kind]
    found = []
    for number, shown in enumerate((groups, groups, changed, {f"{label}!": rows for label, rows in groups.items()})):
        path = tmp_path / f"{number}.png"
        function(shown, path)
        found.append(look(path))
    assert found[0] == found[1]
    assert found[2] != found[0] != found[3]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("kind", examples())
def test_empty_comparisons_are_rejected(tmp_path: Path, kind: str) -> None:
    function, groups, _ = examples()[kind]
    with pytest.raises(ValueError, match="received (0|no) groups"):
        function({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"'RBN': received no .*; valid: at least one"):
        function({**groups, "RBN": []}, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_comparisons_have_at_most_eight_groups(tmp_path: Path) -> None:
    compare_runs({f"variant {i} with a long name": group(i) for i in range(8)}, tmp_path / "runs.png")
    look(tmp_path / "runs.png")
    compare_similarity({f"variant {i}": similarity(1, 5, shift=i / 10) for i in range(8)}, tmp_path / "similarity.png")
    look(tmp_path / "similarity.png")
    with pytest.raises(ValueError, match="received 9 groups to compare; valid: 1 to 8"):
        compare_runs({str(i): group(i) for i in range(9)}, tmp_path / "more.png")


def test_runs_over_time(tmp_path: Path) -> None:
    groups = {"BatchNorm": group(0), "UBN": group(3)}
    compare_runs(groups, tmp_path / "epochs.png")
    compare_runs(groups, tmp_path / "seconds.png", x="seconds")
    assert look(tmp_path / "epochs.png") != look(tmp_path / "seconds.png")
    slower = {**groups, "UBN": [[dataclasses.replace(row, seconds=30.0) for row in run] for run in groups["UBN"]]}
    compare_runs(slower, tmp_path / "slower.png", x="seconds")
    assert look(tmp_path / "slower.png") != look(tmp_path / "seconds.png")
    compare_runs(slower, tmp_path / "slower_epochs.png")
    assert look(tmp_path / "slower_epochs.png") == look(tmp_path / "epochs.png")
    with pytest.raises(ValueError, match="x: received 'hours'; valid: 'epoch', 'seconds'"):
        compare_runs(groups, tmp_path / "hours.png", x="hours")


def test_runs_of_one_epoch_do_not_overlap(tmp_path: Path) -> None:
    # The same numbers under two labels: if they overlapped, the first group would be hidden.
    compare_runs({"BatchNorm": group(0, epochs=1), "UBN": group(0, epochs=1)}, tmp_path / "one.png")
    _, pixels = look(tmp_path / "one.png")
    colors = [tuple(pixels[i : i + 3]) for i in range(0, len(pixels), 3)]
    blue, vermilion = colors.count((0x00, 0x72, 0xB2)), colors.count((0xD5, 0x5E, 0x00))
    assert min(blue, vermilion) > 0.7 * max(blue, vermilion)


def test_runs_of_different_lengths(tmp_path: Path) -> None:
    compare_runs({"UBN": [metrics(2), metrics(4, seed=1)]}, tmp_path / "runs.png")
    look(tmp_path / "runs.png")
    with pytest.raises(ValueError, match="'UBN': received a run without rows"):
        compare_runs({"UBN": [metrics(2), []]}, tmp_path / "none.png")


def test_similarity_of_one_epoch_has_one_panel(tmp_path: Path) -> None:
    one = similarity(0, 5)
    compare_similarity({"model": one}, tmp_path / "one.png")
    compare_similarity({"model": similarity(3, 5), "other": one}, tmp_path / "two.png")
    assert look(tmp_path / "two.png")[0][0] > 1.4 * look(tmp_path / "one.png")[0][0]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'ubn-zoo\[quickstart\]'"):
        compare_similarity({"UBN": similarity(1, 2)}, tmp_path / "none.png")


def test_a_failed_plot_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "similarity.png"
    compare_similarity({"UBN": similarity(1, 2)}, path)
    before = path.read_bytes()

    def full(self: Figure, target: Path, **_: Any) -> None:
        Path(target).write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        compare_similarity({"UBN": similarity(2, 3)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
