"""Charts of data and results, drawn by Matplotlib without a display.

It is imported when the first chart is drawn: that takes more than half a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from utils.drawing import write_picture
from utils.metrics import CONFIDENCE_AXIS, ClassMetrics

if TYPE_CHECKING:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which the colour-blind can tell apart; a line that repeats one has other dashes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
MANY_CLASSES = 20  # above this a legend with one line per class would not be readable


def _figure(width: float, height: float, margins: tuple[float, float, float, float] | None = None) -> Figure:
    """A figure of so many inches whose margins (left, right, bottom, top; inches) fit its text unless they are given:
    finding them out takes two thirds as long as drawing."""
    # Not through pyplot: that keeps every figure alive in a global list, and looks for a display.
    from matplotlib.figure import Figure

    if margins is None:
        return Figure(figsize=(width, height), layout="tight")
    left, right, bottom, top = margins
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def plot_class_curves(metrics: ClassMetrics, names: Mapping[int, str], folder: Path) -> None:
    """Writes PR_curve.png, F1_curve.png, P_curve.png and R_curve.png, all at IoU 0.5."""
    labels = [names.get(int(label), str(label)) for label in metrics.classes]
    folder = Path(folder)
    captions = [f"{name} {value:.3f}" for name, value in zip(labels, metrics.ap50, strict=True)]
    mean = metrics.ap50.mean() if len(labels) else 0.0
    _curves(
        metrics.precision_by_recall, captions, f"all classes {mean:.3f} mAP@0.5", "Recall", "Precision",
        "Precision-recall curve at IoU 0.5", folder / "PR_curve.png",
    )  # fmt: skip
    for key, curves in (
        ("F1", metrics.f1_curve),
        ("Precision", metrics.precision_curve),
        ("Recall", metrics.recall_curve),
    ):
        average = curves.mean(0) if len(labels) else np.zeros_like(CONFIDENCE_AXIS)
        best = int(average.argmax())
        summary = f"all classes {average[best]:.2f} at {CONFIDENCE_AXIS[best]:.3f}"
        short = key if key == "F1" else key[0]
        file = folder / f"{short}_curve.png"
        _curves(curves, labels, summary, "Confidence", key, f"{key}-confidence curve at IoU 0.5", file)


def _line_style(index: int) -> dict[str, str]:
    """Colour and dashes of the line with this number: 28 are all different."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def _curves(
    curves: np.ndarray, labels: list[str], summary: str, x_label: str, y_label: str, title: str, file: Path
) -> None:
    several = len(labels) <= MANY_CLASSES
    figure = _figure(9, 6, None if several else (0.7, 2.9, 0.6, 0.4))
    axes = figure.add_subplot()
    if several:
        for index, (curve, label) in enumerate(zip(curves, labels, strict=True)):
            axes.plot(CONFIDENCE_AXIS, curve, label=label, linewidth=1.4, **_line_style(index))
    else:
        axes.add_collection(_grey_lines(curves))
    if len(labels):
        if not several:
            axes.plot([], [], color="0.75", label=f"each of {len(labels)} classes")
        axes.plot(CONFIDENCE_AXIS, curves.mean(0), linewidth=3, color="black", label=summary)
    axes.set(xlabel=x_label, ylabel=y_label, title=title, xlim=(0, 1), ylim=(0, 1.02))
    if len(labels):
        axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False)
    _save(figure, file, 150)


def _grey_lines(curves: np.ndarray) -> LineCollection:
    """Curves (C, 1000) as one object instead of a line each."""
    from matplotlib.collections import LineCollection

    points = np.stack(np.broadcast_arrays(CONFIDENCE_AXIS, curves), -1)
    return LineCollection(points, colors="0.75", linewidths=0.6)


def _save(figure: Figure, file: Path, dpi: int) -> None:
    """Draws a figure and writes it. OpenCV compresses a PNG several times as fast as Matplotlib's own writer does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_picture(file, cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR))


def plot_confusion_matrix(matrix: np.ndarray, labels: Sequence[str], file: Path) -> None:
    """Draws a ``ConfusionMatrix.matrix`` with every column divided by its sum: what labels of a class were taken for.

    Args:
        matrix: (C + 1, C + 1); row predicted, column labelled; background last.
        labels: C class names.
    """
    names = [*labels, "background"]
    shares = matrix / np.maximum(matrix.sum(0, keepdims=True), 1)
    number = len(names)
    side = min(max(7.0, 0.15 * number + 3), 18)
    size = 9 if number <= MANY_CLASSES else 7
    room = 0.5 + 0.009 * size * max(map(len, names))  # inches: letters are half as wide as they are high
    figure = _figure(side + 1.7, side, (room, 0.8, room, 0.4) if number > MANY_CLASSES else None)
    axes = figure.add_subplot()
    shown = np.where(shares < 0.005, np.nan, shares)
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, label="share of the column")
    if number <= MANY_CLASSES:
        axes.set_xticks(range(number), names, rotation=90, fontsize=size)
        axes.set_yticks(range(number), names, fontsize=size)
        axes.set(xlabel="Labelled", ylabel="Predicted")
    else:  # a tick is five objects, of which its label is one
        axes.set(xticks=[], yticks=[])
        for position, name in enumerate(names):
            axes.text(position, number, name, rotation=90, ha="center", va="top", fontsize=size)
            axes.text(-1, position, name, ha="right", va="center", fontsize=size)
        figure.supxlabel("Labelled", fontsize=10, y=0.005)
        figure.supylabel("Predicted", fontsize=10, x=0.005)
    axes.set_title("Confusion matrix: what objects of each class were taken for")
    if number <= 31:
        for row, column in np.argwhere(np.isfinite(shown)):
            value = shares[row, column]
            ink = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=size)
    else:
        # Two objects: a grid of minor ticks has hundreds.
        between = np.arange(number - 1) + 0.5
        axes.hlines(between, -0.5, number - 0.5, color="0.93", linewidth=0.5)
        axes.vlines(between, -0.5, number - 0.5, color="0.93", linewidth=0.5)
    _save(figure, file, 150 if number <= MANY_CLASSES else 100)


def plot_labels(labels: np.ndarray, names: Mapping[int, str], folder: Path) -> None:
    """Writes labels.jpg: boxes per class, and where boxes lie and how large they are; and labels_correlogram.jpg.

    Args:
        labels: (n, 5) rows class, centre x, centre y, width, height; normalised.
    """
    labels = np.asarray(labels, dtype=float).reshape(-1, 5)
    number = len(names)
    figure = _figure(max(10, min(0.2 * number, 20)), 9)
    grid = figure.add_gridspec(2, 2)
    counts = np.bincount(labels[:, 0].astype(int), minlength=number)
    axes = figure.add_subplot(grid[0, :])
    bars = axes.bar(range(len(counts)), counts, color=COLORS[0], width=min(0.8, 0.1 * number))
    if number <= MANY_CLASSES:
        axes.bar_label(bars)
    axes.set(ylabel="boxes", title=f"{len(labels)} boxes, {number} classes")
    ticks = [names.get(i, str(i)) for i in range(len(counts))]
    axes.set_xticks(range(len(counts)), ticks, rotation=90 if number > 8 else 0, fontsize=8 if number > 30 else 10)
    axes.set_xlim(-0.7, len(counts) - 0.3)
    for column, (x, y, title) in enumerate(((1, 2, "centre"), (3, 4, "size"))):
        axes = figure.add_subplot(grid[1, column])
        bins = axes.hist2d(labels[:, x], labels[:, y], bins=50, range=((0, 1), (0, 1)), cmap=_visible_blues(), cmin=1)
        figure.colorbar(bins[3], ax=axes, label="boxes", ticks=_whole_numbers())
        names_of_axes = ("x", "y") if title == "centre" else ("width", "height")
        axes.set(xlabel=names_of_axes[0], ylabel=names_of_axes[1], title=f"Box {title}, share of the image")
        if title == "centre":
            axes.invert_yaxis()
    _save(figure, Path(folder) / "labels.jpg", 150)
    _plot_correlogram(labels[:, 1:], Path(folder) / "labels_correlogram.jpg")


def _visible_blues() -> Colormap:
    """Blues without the lightest quarter: a single box must be seen on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Blues"](np.linspace(0.3, 1, 256)))


def _whole_numbers() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)  # with one epoch, a second tick would be a fraction


def _plot_correlogram(boxes: np.ndarray, file: Path) -> None:
    """How x, y, width and height of boxes (n, 4) go together: each on the diagonal, each pair below it."""
    names = ("x", "y", "width", "height")
    figure = _figure(10, 10)
    grid = figure.add_gridspec(4, 4)
    for row in range(4):
        for column in range(row + 1):
            axes = figure.add_subplot(grid[row, column])
            if row == column:
                axes.hist(boxes[:, row], bins=50, range=(0, 1), color=COLORS[0])
                axes.set_ylabel("boxes")
            else:
                places = boxes[:, column], boxes[:, row]
                axes.hist2d(*places, bins=50, range=((0, 1), (0, 1)), cmap=_visible_blues(), cmin=1)
                axes.set_ylim(0, 1)
            axes.set_xlim(0, 1)
            axes.tick_params(labelsize=8)
            if row == 3:
                axes.set_xlabel(names[column])
            elif column == 0:
                axes.set_ylabel(names[row])
    figure.suptitle(f"{len(boxes)} boxes: shares of the image's sides")
    _save(figure, file, 150)


# Columns of results.csv that belong into one chart: title, unit, column -> name of its line.
RESULT_CHARTS = (
    ("Box loss", "loss", {"train/box_loss": "training", "val/box_loss": "validation"}),
    ("Objectness loss", "loss", {"train/obj_loss": "training", "val/obj_loss": "validation"}),
    ("Class loss", "loss", {"train/cls_loss": "training", "val/cls_loss": "validation"}),
    ("Average precision", "0 to 1", {"metrics/mAP_0.5": "mAP50", "metrics/mAP_0.75": "mAP75",
                                     "metrics/mAP_0.5:0.95": "mAP50-95"}),
    ("Precision, recall", "0 to 1", {"metrics/precision": "precision", "metrics/recall": "recall"}),
    ("Boxes matched at IoU 0.5", "0 to 1", {"metrics/matched": "share of labels", "metrics/matched_IoU": "mean IoU",
                                            "metrics/right_class": "right class"}),
    ("Learning rate", "", {"x/lr0": "biases", "x/lr1": "weights", "x/lr2": "norms"}),
    ("Fusion", "0 to 1", {"quant/strength": "normalisation", "quant/deployable": "may be best.pt"}),
)  # fmt: skip
FACTOR_UNIT = "K alpha"
# Columns with a common beginning: pattern, title, unit.
RESULT_FAMILIES = (
    (r"(.+)\.balance/factor(\d+)", "{}: branch factor", FACTOR_UNIT),
    (r"(.+)\.balance/gradient(\d+)", "{}: gradient norm", "norm"),
    (r"quant/(.+)_(loss)", "{}: loss", "loss"),
    (r"quant/(.+)_gradient_(ratio)", "{}: gradient", "of the task's"),
)


def _result_charts(columns: Sequence[str]) -> list[tuple[str, str, dict[str, str]]]:
    """Title, unit and column -> line of each chart; columns that belong to none get one of their own."""
    charts = [
        (title, unit, {c: name for c, name in lines.items() if c in columns}) for title, unit, lines in RESULT_CHARTS
    ]
    families: dict[tuple[str, str], dict[str, str]] = {}
    for pattern, title, unit in RESULT_FAMILIES:
        for column in columns:
            if match := re.fullmatch(pattern, column):
                name = f"branch {match[2]}" if match[2].isdigit() else match[2]
                families.setdefault((title.format(match[1]), unit), {})[column] = name
    charts += [(title, unit, lines) for (title, unit), lines in families.items()]
    drawn = {column for *_, lines in charts for column in lines}
    charts += [(column, "", {column: column}) for column in columns if column not in drawn]
    return [chart for chart in charts if chart[2]]


def plot_results(file: Path) -> None:
    """Draws the columns of a run's results.csv over the epochs into results.png beside it."""
    file = Path(file)
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    header = [name.strip() for name in lines[0].split(",")]
    values = np.array([[_number(cell) for cell in line.split(",")] for line in lines[1:]]).reshape(-1, len(header))
    series = {name: values[:, i] for i, name in enumerate(header) if i and np.isfinite(values[:, i]).any()}
    charts, epochs = _result_charts(list(series)), values[:, 0] + 1  # counted from 1, as on the screen
    columns = min(4, max(len(charts), 1))
    rows = max(math.ceil(len(charts) / columns), 1)
    figure = _figure(3.6 * columns, 2.7 * rows)
    for index, (title, unit, shown) in enumerate(charts):
        axes = figure.add_subplot(rows, columns, index + 1)
        for number, (column, name) in enumerate(shown.items()):
            known = np.isfinite(series[column])
            style = {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}
            axes.plot(
                epochs[known], series[column][known], marker=".", linewidth=1.5, markersize=4, label=name, **style
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)  # also where a value is not in every epoch
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.ticklabel_format(axis="y", useOffset=False)  # "+1" above an axis reads as if it were its title
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_ylabel(unit, fontsize=8)
        if unit == FACTOR_UNIT:  # next to nothing is to look like it
            axes.set_ylim(min(axes.get_ylim()[0], 0.9), max(axes.get_ylim()[1], 1.1))
        if len(shown) > 1:
            axes.legend(fontsize=7, framealpha=0.6)
        if index >= len(charts) - columns:
            axes.set_xlabel("epoch", fontsize=9)
    _save(figure, file.with_suffix(".png"), 150)


def plot_evolution(
    tried: Sequence[Mapping[str, float]], scores: Sequence[float], keys: Sequence[str], file: Path
) -> None:
    """Draws fitness over each hyperparameter of a search that took more than one value; the best one is marked.

    Args:
        tried: the hyperparameters of each generation.
        scores: its fitness.
        keys: those to draw.
    """
    scores = np.asarray(scores)
    keys = [key for key in keys if len({hyp[key] for hyp in tried}) > 1]
    columns = min(5, max(len(keys), 1))
    rows = max(math.ceil(len(keys) / columns), 1)
    figure = _figure(3 * columns, 2.6 * rows)
    best = int(scores.argmax())
    for index, key in enumerate(keys):
        values = np.array([hyp[key] for hyp in tried])
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.scatter(values, scores, c=np.arange(len(scores)), cmap="viridis", s=14)
        axes.plot(values[best], scores[best], "+", color=COLORS[1], markersize=14, markeredgewidth=2)
        axes.set_title(f"{key} = {values[best]:.3g}", fontsize=10)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("value", fontsize=9)
        if index % columns == 0:
            axes.set_ylabel("fitness", fontsize=9)
    figure.suptitle(f"{len(tried)} generations, dark: early; the cross is the best one", fontsize=11)
    _save(figure, Path(file), 150)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def plot_study(curves: Mapping[str, np.ndarray], file: Path) -> None:
    """Draws mAP50-95 over milliseconds per image of every model: (n, 8) rows as ``val.py --task study`` has them."""
    figure = _figure(9, 6)
    axes = figure.add_subplot()
    for index, (name, rows) in enumerate(curves.items()):
        milliseconds = rows[:, 5:8].sum(1)
        axes.plot(milliseconds, rows[:, 4], marker="o", label=name, **_line_style(index))
        for size, x, y in zip(rows[:, 0], milliseconds, rows[:, 4], strict=True):
            axes.annotate(f"{size:.0f}", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
    axes.set(xlabel="ms per image", ylabel="mAP50-95", title="Accuracy and time by image size")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file, 200)
