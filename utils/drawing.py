"""Boxes drawn on images: one image, or a batch as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

MAX_BATCH_IMAGES = 16
MAX_MOSAIC_SIDE = 1920
CAPTION_MARGIN = 3  # pixels left and right of the letters
SMALL_TILE = 400  # pixels: in tiles below this size lines of two pixels would hide small objects
DRAWN_CONFIDENCE = 0.25  # detections under this are left out of the pictures of a batch
# The first classes have colours of Okabe and Ito, which the colour-blind can tell apart; BGR.
FIRST_COLORS = (
    (0, 94, 213), (178, 114, 0), (66, 228, 240), (115, 158, 0), (167, 121, 204), (233, 180, 86), (0, 159, 230),
)  # fmt: skip


def class_color(label: int) -> tuple[int, int, int]:
    """A fixed BGR colour per class; behind the first seven, neighbours differ in hue by the golden angle, and in
    brightness by turns."""
    if label < len(FIRST_COLORS):
        return FIRST_COLORS[label]
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
        top = max(corner[1] - height if corner[1] >= height else corner[1], 0)
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
        drawn.sort(key=lambda row: row[6] if len(row) > 6 else 0.0)  # the most confident on top
        # Under the boxes' captions, and at the bottom, where those of the topmost objects do not lie.
        annotator.text(Path(paths[index]).name[:40], (0, height - 2), (220, 220, 220))
        for row in drawn:
            annotator.box(row[2:6] * scale, color=class_color(int(row[1])))
        for row in drawn:  # captions last: no box of a neighbour runs through them
            name = names.get(int(row[1]), str(int(row[1])))
            caption = f"{name} {row[6]:.1f}" if len(row) > 6 else name
            annotator.text(caption, (round(row[2] * scale), round(row[3] * scale)), class_color(int(row[1])))
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height, left : left + width] = annotator.image
        cv2.rectangle(canvas, (left, top), (left + width - 1, top + height - 1), (255, 255, 255), 2)
    write_picture(file, canvas)


def write_picture(file: Path, image: np.ndarray) -> None:
    """Writes a BGR image in the format of the file's suffix."""
    # Encoded in memory: OpenCV's own writer fails silently on paths with letters outside ASCII on some systems.
    ok, encoded = cv2.imencode(Path(file).suffix, image)
    if not ok:
        raise ValueError(f"{file}: no image format known by this suffix")
    Path(file).write_bytes(encoded.tobytes())
