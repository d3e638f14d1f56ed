"""The training images of the data set in their simplest form: what ``utils.dataset`` computes, without its shortcuts.

All four images of a mosaic are loaded and pasted onto a whole canvas, the whole canvas is warped, hue, saturation and
value are changed one after the other, boxes are treated tile by tile. It draws the same random numbers in the same
order, so its images and labels can be compared, and it is what ``loader.py`` measures the loader's speed against.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from utils.augment import draw_perspective_matrix  # noqa: E402
from utils.dataset import AUGMENT_STREAM, DetectionDataset  # noqa: E402
from utils.images import read_image  # noqa: E402

GREY = (114, 114, 114)
WARP = ("degrees", "translate", "scale", "shear", "perspective")
# "Rows" are float64 (n, 5): class, left, top, right, bottom in pixels.


def load(dataset: DetectionDataset, index: int) -> np.ndarray:
    """One image file, BGR, its long side scaled to the data set's size."""
    image = read_image(dataset.image_files[index])
    height, width = image.shape[:2]
    ratio = dataset.image_size / max(height, width)
    if ratio == 1:
        return image
    return cv2.resize(image, (math.ceil(width * ratio), math.ceil(height * ratio)), interpolation=cv2.INTER_LINEAR)


def item(
    dataset: DetectionDataset, index: int, epoch: int = 0, load: Callable[[DetectionDataset, int], np.ndarray] = load
) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB uint8 (3, size, size) and labels float32 (n, 6), as ``dataset[(epoch, index)]`` has them.

    Hyperparameters may not ask for rotation, shear, perspective or mixup, which the recipes that are measured lack.
    """
    hyp, size = dataset.hyp, dataset.image_size
    assert not any(hyp.get(key) for key in ("degrees", "shear", "perspective", "mixup"))
    rng = np.random.default_rng([dataset.seed, epoch, index, AUGMENT_STREAM])
    in_mosaic = rng.random() < hyp["mosaic"]
    if in_mosaic:
        chosen = [int(number) for number in rng.permutation([index, *rng.integers(len(dataset), size=3)])]
        canvas, rows = mosaic(dataset, chosen, rng, load)
    else:
        canvas, rows = padded(dataset, index, load)
    image, rows = scale_and_move(canvas, rows, rng, size, hyp)
    if in_mosaic:
        rng.random()  # whether to mix up
    gains = [hyp[f"hsv_{letter}"] for letter in "hsv"]
    if any(gains):
        image = shift_hsv(image, 1 + rng.uniform(-1, 1, 3) * gains)
    vertical, horizontal = rng.random(2) < (hyp["flipud"], hyp["fliplr"])
    if vertical:
        image = np.flipud(image)
        rows[:, [2, 4]] = size - rows[:, [4, 2]]
    if horizontal:
        image = np.fliplr(image)
        rows[:, [1, 3]] = size - rows[:, [3, 1]]
    image = np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])
    return torch.from_numpy(image), normalised(rows, size)


def mosaic(dataset: DetectionDataset, chosen: list[int], rng: np.random.Generator, load: Callable) -> tuple:
    """The whole canvas of four images around a random point, and its boxes."""
    size = dataset.image_size
    canvas = np.full((2 * size, 2 * size, 3), 114, np.uint8)
    centre_x, centre_y = int(rng.uniform(size / 2, 1.5 * size)), int(rng.uniform(size / 2, 1.5 * size))
    rows = []
    for position, index in enumerate(chosen):
        image = load(dataset, index)
        height, width = image.shape[:2]
        left = centre_x - width if position in (0, 2) else centre_x
        top = centre_y - height if position in (0, 1) else centre_y
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, 2 * size), min(top + height, 2 * size)
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
        rows.append(pixel_boxes(dataset, index, width, height, left, top))
    rows = np.concatenate(rows)
    rows[:, 1:] = rows[:, 1:].clip(0, 2 * size)
    return canvas, rows


def padded(dataset: DetectionDataset, index: int, load: Callable) -> tuple[np.ndarray, np.ndarray]:
    """One image in the middle of a grey square, and its boxes."""
    image, size = load(dataset, index), dataset.image_size
    height, width = image.shape[:2]
    pad_x, pad_y = (size - width) / 2, (size - height) / 2
    canvas = np.full((size, size, 3), 114, np.uint8)
    left, top = int(pad_x), int(pad_y)
    canvas[top : top + height, left : left + width] = image
    return canvas, pixel_boxes(dataset, index, width, height, pad_x, pad_y)


def pixel_boxes(dataset: DetectionDataset, index: int, width: int, height: int, left: float, top: float) -> np.ndarray:
    """The labels of one image as rows in pixels of a canvas on which it lies at (left, top)."""
    labels = dataset.labels[index].astype(np.float64)
    rows = labels.copy()
    rows[:, 1] = width * (labels[:, 1] - labels[:, 3] / 2) + left
    rows[:, 2] = height * (labels[:, 2] - labels[:, 4] / 2) + top
    rows[:, 3] = width * (labels[:, 1] + labels[:, 3] / 2) + left
    rows[:, 4] = height * (labels[:, 2] + labels[:, 4] / 2) + top
    return rows


def scale_and_move(canvas: np.ndarray, rows: np.ndarray, rng: np.random.Generator, size: int, hyp: dict) -> tuple:
    """An affine warp of the whole canvas, of which a whole number of pixels is shown; what is left of the boxes."""
    warp = {key: hyp.get(key, 0.0) for key in WARP}
    drawn, factor = draw_perspective_matrix(rng, canvas.shape, (size, size), **warp)
    left, top = round(-drawn[0, 2] / factor), round(-drawn[1, 2] / factor)
    factor = size / round(size / factor)
    # Coordinates count from pixels' edges, OpenCV's from their centres.
    matrix = np.array([[factor, 0, (0.5 - left) * factor - 0.5], [0, factor, (0.5 - top) * factor - 0.5]])
    image = cv2.warpAffine(canvas, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=GREY)
    moved = (rows[:, 1:] - (left, top, left, top)) * factor
    cut = moved.clip(0, size)
    width, height = cut[:, 2] - cut[:, 0], cut[:, 3] - cut[:, 1]
    area = (moved[:, 2] - moved[:, 0]) * (moved[:, 3] - moved[:, 1])
    keep = (np.minimum(width, height) > 2) & (width * height > 0.1 * area)
    keep &= np.maximum(width, height) < 100 * np.minimum(width, height)
    return image, np.concatenate([rows[keep, :1], cut[keep]], 1)


def shift_hsv(image: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Hue, saturation and value times their gains, plane after plane, each through a table of its 256 products."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
    levels = np.arange(256)
    hue = cv2.LUT(hue, (np.rint(levels * gains[0]) % 180).astype(np.uint8))
    saturation = cv2.LUT(saturation, np.rint(levels * gains[1]).clip(0, 255).astype(np.uint8))
    value = cv2.LUT(value, np.rint(levels * gains[2]).clip(0, 255).astype(np.uint8))
    return cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2BGR)


def normalised(rows: np.ndarray, size: int) -> torch.Tensor:
    """(n, 6): 0, class, normalised xywh, clipped a thousandth of a pixel inside of the image."""
    targets = torch.zeros(len(rows), 6)
    boxes = rows[:, 1:].clip(0, size - 1e-3) / size
    targets[:, 1] = torch.from_numpy(rows[:, 0])
    targets[:, 2:4] = torch.from_numpy((boxes[:, :2] + boxes[:, 2:]) / 2)
    targets[:, 4:6] = torch.from_numpy(boxes[:, 2:] - boxes[:, :2])
    return targets
