"""Pictures of data, detections and results. OpenCV draws on images, Matplotlib (without a display) draws charts.

Matplotlib is imported when the first chart is drawn: that takes more than half a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.metrics import CONFIDENCE_AXIS, ClassMetrics

if TYPE_CHECKING:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

MANY_CLASSES = 20  # above this a legend with one line per class would not be readable
MAX_BATCH_IMAGES = 16
MAX_MOSAIC_SIDE = 1920
CAPTION_MARGIN = 3  # pixels left and right of the letters
SMALL_TILE = 400  # pixels: in tiles below this size lines of two pixels would hide small objects
DRAWN_CONFIDENCE = 0.25  # detections under this are left out of the pictures of a batch


def class_color(label: int) -> tuple[int, int, int]:
    """A fixed BGR colour per class; neighbours differ in hue by the golden angle, and in brightness by turns."""
    hue = int(label * 137.508 % 360 / 2)
    saturation, value = (255, 190, 140)[label // 3 % 3], (255, 200)[label % 2]
    pixel = cv2.cvtColor(np.array([[[hue, saturation, value]]], dtype=np.uint8), cv2.COLOR_HSV2BGR)
    return tuple(int(channel) for channel in pixel[0, 0])


class Annotator:
    """Draws boxes with captions into a BGR image (changed in place: see ``image``)."""

    def __init__(self, image: np.ndarray, line_width: int | None = None) -> None:
        self.image = np.ascontiguousarray(image)
        self.line_width = line_width or max(round(sum(image.shape[:2]) / 2 * 0.003), 2)
        self.font_scale = max(self.line_width / 6, 0.4)
        self.font_width = max(self.line_width // 2, 1)

    def box(self, corners: Sequence[float], caption: str = "", color: tuple[int, int, int] = (128, 128, 128)) -> None:
        """Draws one box x1, y1, x2, y2 in pixels; the caption stands on its top edge, or inside if there is no room."""
        left, top, right, bottom = (round(float(value)) for value in corners)
        cv2.rectangle(self.image, (left, top), (right, bottom), color, self.line_width, cv2.LINE_AA)
        if caption:
            self.text(caption, (left, top), color)

    def text(self, caption: str, corner: tuple[int, int], background: tuple[int, int, int]) -> None:
        """Writes on a filled ground whose lower left corner is ``corner``, moved so that it stays inside the image."""
        (width, height), base = cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, self.font_scale, self.font_width)
        width, height = width + 2 * CAPTION_MARGIN, height + base + 2
        left = max(min(corner[0], self.image.shape[1] - width), 0)
        top = corner[1] - height if corner[1] >= height else corner[1]
        cv2.rectangle(self.image, (left, top), (left + width, top + height), background, -1, cv2.LINE_AA)
        blue, green, red = background
        ink = (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 140 else (255, 255, 255)
        position = (left + CAPTION_MARGIN, top + height - base)
        cv2.putText(
            self.image, caption, position, cv2.FONT_HERSHEY_SIMPLEX, self.font_scale, ink, self.font_width, cv2.LINE_AA
        )


def plot_images(
    images: Tensor, boxes: Tensor, paths: Sequence[str | Path], file: Path, names: Mapping[int, str]
) -> None:
    """Writes the first images of a batch as one picture, with their boxes and file names.

    Args:
        images: (B, 3, H, W) RGB, uint8 or float in 0..1.
        boxes: (n, 6) rows image index, class, x1, y1, x2, y2 in pixels; a seventh column is a confidence: boxes below
            0.25 are left out and the others show it.
    """
    number = min(len(images), MAX_BATCH_IMAGES)
    pixels = images[:number].detach()
    pixels = (pixels.float() * 255).round().to(torch.uint8) if pixels.is_floating_point() else pixels
    pixels = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy()[..., ::-1])
    rows = boxes.detach().float().cpu().numpy()
    height, width = pixels.shape[1:3]
    columns = math.ceil(math.sqrt(number))
    lines = math.ceil(number / columns)
    scale = min(1.0, MAX_MOSAIC_SIDE / max(columns * width, lines * height))
    height, width = math.ceil(height * scale), math.ceil(width * scale)
    canvas = np.full((lines * height, columns * width, 3), 255, dtype=np.uint8)
    for index in range(number):
        tile = cv2.resize(pixels[index], (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else pixels[index]
        annotator = Annotator(tile, line_width=1 if max(height, width) < SMALL_TILE else 2)
        drawn = [row for row in rows[rows[:, 0] == index] if len(row) < 7 or row[6] >= DRAWN_CONFIDENCE]
        for row in drawn:
            annotator.box(row[2:6] * scale, color=class_color(int(row[1])))
        for row in drawn:  # captions last: no box of a neighbour runs through them
            name = names.get(int(row[1]), str(int(row[1])))
            caption = f"{name} {row[6]:.1f}" if len(row) > 6 else name
            annotator.text(caption, (round(row[2] * scale), round(row[3] * scale)), class_color(int(row[1])))
        annotator.text(Path(paths[index]).name[:40], (0, 0), (220, 220, 220))
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height, left : left + width] = annotator.image
        cv2.rectangle(canvas, (left, top), (left + width - 1, top + height - 1), (255, 255, 255), 2)
    _write(file, canvas)


def _write(file: Path, image: np.ndarray) -> None:
    # Encoded in memory: OpenCV's own writer fails silently on paths with letters outside ASCII on some systems.
    ok, encoded = cv2.imencode(Path(file).suffix, image)
    if not ok:
        raise ValueError(f"{file}: no image format known by this suffix")
    Path(file).write_bytes(encoded.tobytes())


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
        "Precision-recall curve", folder / "PR_curve.png",
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
        _curves(curves, labels, summary, "Confidence", key, f"{key}-confidence curve", file)


def _curves(
    curves: np.ndarray, labels: list[str], summary: str, x_label: str, y_label: str, title: str, file: Path
) -> None:
    several = len(labels) <= MANY_CLASSES
    figure = _figure(9, 6, None if several else (0.7, 2.9, 0.6, 0.4))
    axes = figure.add_subplot()
    if several:
        for curve, label in zip(curves, labels, strict=True):
            axes.plot(CONFIDENCE_AXIS, curve, label=label, linewidth=1.2)
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
    _write(file, cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR))


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
    figure = _figure(side + 1.5, side, (room, 0.4, room, 0.4) if number > MANY_CLASSES else None)
    axes = figure.add_subplot()
    shown = np.where(shares < 0.005, np.nan, shares)
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
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
    axes.set_title("Confusion matrix, share of each column")
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
    axes.bar(range(len(counts)), counts, color="tab:blue")
    axes.set(ylabel="boxes", title=f"{len(labels)} boxes, {number} classes")
    ticks = [names.get(i, str(i)) for i in range(len(counts))]
    axes.set_xticks(range(len(counts)), ticks, rotation=90 if number > 8 else 0, fontsize=8 if number > 30 else 10)
    axes.margins(x=0.01)
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
                axes.hist(boxes[:, row], bins=50, range=(0, 1), color="tab:blue")
            else:
                places = boxes[:, column], boxes[:, row]
                axes.hist2d(*places, bins=50, range=((0, 1), (0, 1)), cmap=_visible_blues(), cmin=1)
                axes.set_ylim(0, 1)
            axes.set_xlim(0, 1)
            axes.tick_params(labelsize=8)
            if row == 3:
                axes.set_xlabel(names[column])
            if column == 0:
                axes.set_ylabel(names[row] if row else "boxes")
    figure.suptitle(f"{len(boxes)} boxes: shares of the image's sides")
    _save(figure, file, 150)


def plot_results(file: Path) -> None:
    """Draws every column of a run's results.csv over the epochs into results.png beside it."""
    file = Path(file)
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    header = [name.strip() for name in lines[0].split(",")]
    values = np.array([[_number(cell) for cell in line.split(",")] for line in lines[1:]]).reshape(-1, len(header))
    series = [(name, values[:, i]) for i, name in enumerate(header) if i and np.isfinite(values[:, i]).any()]
    columns = min(5, max(len(series), 1))
    rows = max(math.ceil(len(series) / columns), 1)
    figure = _figure(3 * columns, 2.6 * rows)
    for index, (name, column) in enumerate(series):
        axes = figure.add_subplot(rows, columns, index + 1)
        known = np.isfinite(column)
        axes.plot(values[known, 0], column[known], marker=".", linewidth=1.5, markersize=4)
        axes.set_title(name, fontsize=10)
        axes.set_xlim(values[:, 0].min() - 0.5, values[:, 0].max() + 0.5)  # also where a value is not in every epoch
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.ticklabel_format(axis="y", useOffset=False)  # "+1" above an axis reads as if it were its title
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if index >= len(series) - columns:
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
        axes.plot(values[best], scores[best], "+", color="tab:red", markersize=14)
        axes.set_title(f"{key} = {values[best]:.3g}", fontsize=10)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=8)
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
    for name, rows in curves.items():
        milliseconds = rows[:, 5:8].sum(1)
        axes.plot(milliseconds, rows[:, 4], marker="o", label=name)
        for size, x, y in zip(rows[:, 0], milliseconds, rows[:, 4], strict=True):
            axes.annotate(f"{size:.0f}", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
    axes.set(xlabel="ms per image", ylabel="mAP50-95", title="Accuracy and time by image size")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file, 200)
