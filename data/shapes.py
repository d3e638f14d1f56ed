"""Draws the shapes data set: a few hundred small images with exact boxes, the same ones for the same seed.

Objects are rings, triangles, squares and stars of any colour, size and rotation, some overlapping, some cut by the
image's edge, on plain, graded, striped, chequered or blotchy ground with clutter that is none of the four. Grey haze
takes contrast from some images: a float network hardly minds, but codes of 4 bits that must hold bright and faint
images alike lose some of the faint ones unless the network is trained with them.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.images import write_image
from utils.log import LOGGER
from utils.threads import ThreadPool

CLASSES = ("ring", "triangle", "square", "star")
STAMP_FILE = "drawn.json"
VERSION = 2  # to be raised when the drawing code changes, so that older folders are drawn anew
OVERSAMPLING = 4  # masks are drawn this many times larger and averaged down
TRIES = 25  # positions that are tried for an object before it is given up


@dataclass(frozen=True)
class Drawing:
    """How much is drawn and how hard it is. Part of the folder's stamp: a change here draws the data set anew."""

    train_images: int = 480
    val_images: int = 100
    image_size: int = 128  # pixels
    objects: tuple[int, int] = (3, 6)  # per image, from and to
    diameter: tuple[float, float] = (20.0, 64.0)  # pixels around a shape, drawn log-uniformly
    squeeze: float = 0.8  # a shape's narrowest width as a share of its length
    minimum_visible: float = 0.88  # share of an object that later ones and the image's edge must leave
    minimum_box: int = 6  # pixels; the shorter side of a visible extent
    minimum_contrast: float = 130.0  # colour distance (RGB, 0..441) between an object and the ground under it
    textured_objects: float = 0.2  # share of objects that are filled with stripes or a gradient
    clutter: tuple[int, int] = (0, 2)  # strokes, arcs, blobs and bars per image
    noise: float = 8.0  # largest standard deviation of the pixel noise
    blur: float = 0.9  # pixels; largest standard deviation of the final blur
    contrast: tuple[float, float] = (0.45, 1.0)  # share of the contrast that haze leaves, drawn log-uniformly


# --- outlines, in units of the radius
def _circle(radius: float = 1.0, points: int = 64) -> np.ndarray:
    angles = np.arange(points) * (2 * np.pi / points)
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _star(inner: float = 0.42) -> np.ndarray:
    return _circle(points=10) * np.where(np.arange(10) % 2, inner, 1.0)[:, None]


def _outlines(category: str) -> list[np.ndarray]:
    """The polygons (points, 2) of a shape; a second one is a hole."""
    return {
        "ring": lambda: [_circle(), _circle(0.55)],
        "triangle": lambda: [_circle(points=3)],
        "square": lambda: [_circle(points=4)],
        "star": lambda: [_star()],
    }[category]()


def draw_mask(category: str, diameter: float, squeeze: float, angle: float, offset: np.ndarray) -> np.ndarray:
    """The coverage 0..1 (side, side) float32 of one shape on a patch that is just large enough for it.

    Args:
        diameter: of the circle around the shape, in pixels.
        squeeze: factor of the shape's height before it is rotated by ``angle`` (radians).
        offset: (2,) part of a pixel by which it lies right of and below the patch's centre.
    """
    side = int(np.ceil(diameter)) + 3
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    canvas = np.zeros((side * OVERSAMPLING,) * 2, np.uint8)
    for outline, value in zip(_outlines(category), (255, 0), strict=False):
        points = (outline * (1, squeeze)) @ turn.T * (diameter / 2) + side / 2 + offset
        fixed_point = np.round((points * OVERSAMPLING - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(canvas, [fixed_point], value, cv2.LINE_8, shift=4)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


# --- grounds and fillings: (height, width, 3) float32 of 0..255
def _two_colours(rng: np.random.Generator, distance: float = 120.0) -> tuple[np.ndarray, np.ndarray]:
    first = rng.uniform(20, 235, 3)
    return first, np.clip(first + rng.uniform(-distance, distance, 3), 0, 255)


def _mix(weight: np.ndarray, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    first, second = colours
    return (first + weight[..., None] * (second - first)).astype(np.float32)


def _ramp(rng: np.random.Generator, side: int) -> np.ndarray:
    """Distance along a random direction, in pixels: (side, side)."""
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.arange(side) - side / 2
    return np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    return _mix((_ramp(rng, side) / side + 0.75) / 1.5, _two_colours(rng, 160))


def _stripes(rng: np.random.Generator, side: int) -> np.ndarray:
    wave = np.sin(_ramp(rng, side) * (2 * np.pi / rng.uniform(5, 28)))
    return _mix(np.clip(wave * rng.uniform(1, 4), -1, 1) / 2 + 0.5, _two_colours(rng, 90))


def _chequers(rng: np.random.Generator, side: int) -> np.ndarray:
    period = 2 * np.pi / rng.uniform(12, 40)
    return _mix(
        (np.sin(_ramp(rng, side) * period) * np.sin(_ramp(rng, side) * period) > 0) * 1.0, _two_colours(rng, 70)
    )


def _blotches(rng: np.random.Generator, side: int) -> np.ndarray:
    coarse = rng.random((int(rng.integers(4, 24)),) * 2, dtype=np.float32)
    return _mix(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), _two_colours(rng, 140))


def _plain(rng: np.random.Generator, side: int) -> np.ndarray:
    return np.full((side, side, 3), rng.uniform(20, 235, 3), np.float32)


GROUNDS: tuple[Callable, ...] = (_plain, _gradient, _stripes, _chequers, _blotches)
FILLINGS: tuple[Callable, ...] = (_gradient, _stripes)


# --- clutter
def _clutter_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    """The coverage 0..255 (size, size) of one thing that is no object: a stroke, an arc, a blob or a bar."""
    mask = np.zeros((size, size), np.uint8)
    place, kind = rng.uniform(0, size, 2), rng.integers(4)
    if kind == 0:  # a bent stroke
        points = place + np.cumsum(rng.uniform(-size / 5, size / 5, (int(rng.integers(2, 5)), 2)), 0)
        cv2.polylines(mask, [points.round().astype(np.int32)], False, 255, int(rng.integers(1, 4)), cv2.LINE_AA)
    elif kind == 1:  # less than two thirds of a circle, so that it is no ring
        axes = rng.uniform(size / 30, size / 6, 2).round().astype(int).tolist()
        start, thickness = rng.uniform(0, 360), int(rng.integers(1, 5))
        end = start + rng.uniform(50, 220)
        cv2.ellipse(mask, place.astype(int).tolist(), axes, 0, start, end, 255, thickness, cv2.LINE_AA)
    elif kind == 2:  # a lobed blob
        angles = np.arange(48) * (2 * np.pi / 48)
        phases = rng.uniform(0, 2 * np.pi, 2)
        radii = 1 + 0.35 * np.sin(2 * angles + phases[0]) + 0.25 * np.sin(3 * angles + phases[1])
        points = place + rng.uniform(size / 40, size / 10) * radii[:, None] * _circle(points=48)
        cv2.fillPoly(mask, [points.round().astype(np.int32)], 255, cv2.LINE_AA)
    else:  # a bar, far longer than wide
        length, angle = rng.uniform(size / 12, size / 3), rng.uniform(0, 180)
        corners = cv2.boxPoints((tuple(place), (length, length / rng.uniform(4, 8)), angle))
        cv2.fillPoly(mask, [corners.round().astype(np.int32)], 255, cv2.LINE_AA)
    return mask


# --- one image
class _Canvas:
    """An image in the making: pixels, and which object each pixel shows."""

    def __init__(self, rng: np.random.Generator, drawing: Drawing) -> None:
        self.rng, self.drawing, self.size = rng, drawing, drawing.image_size
        self.pixels = GROUNDS[rng.integers(len(GROUNDS))](rng, self.size)
        for _ in range(rng.integers(drawing.clutter[0], drawing.clutter[1] + 1)):
            mask = _clutter_mask(rng, self.size)
            left, top, width, height = cv2.boundingRect(mask)
            rows, columns = slice(top, top + height), slice(left, left + width)
            self._blend(mask[rows, columns].astype(np.float32) / 255, rng.uniform(0, 255, 3), rows, columns)
        self.owner = np.full((self.size, self.size), -1, np.int16)
        self.categories: list[int] = []
        self.areas: list[int] = []  # of the whole objects, in pixels

    def _blend(self, mask: np.ndarray, colour: np.ndarray, rows: slice, columns: slice) -> None:
        part = self.pixels[rows, columns]
        part += mask[..., None] * (np.asarray(colour, np.float32) - part)

    def add(self, category: int) -> bool:
        """Draws one object where enough of it and of all the others stays visible; False if no such place is found."""
        rng, drawing = self.rng, self.drawing
        diameter = np.exp(rng.uniform(*np.log(drawing.diameter)))
        squeeze, angle, offset = rng.uniform(drawing.squeeze, 1), rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5, 2)
        mask = draw_mask(CLASSES[category], diameter, squeeze, angle, offset)
        for _ in range(TRIES):
            left, top = (rng.uniform(0, self.size, 2) - len(mask) / 2).astype(int)
            rows, columns = (slice(max(start, 0), min(start + len(mask), self.size)) for start in (top, left))
            part = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            owner = self.owner.copy()
            owner[rows, columns][part > 0.5] = len(self.areas)
            if self._all_visible(owner, [*self.areas, int((mask > 0.5).sum())]):
                self._blend(part, self._filling(part, rows, columns), rows, columns)
                self.owner = owner
                self.areas.append(int((mask > 0.5).sum()))
                self.categories.append(category)
                return True
        return False

    def _all_visible(self, owner: np.ndarray, areas: list[int]) -> bool:
        seen = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:]
        if (seen < self.drawing.minimum_visible * np.array(areas)).any():
            return False
        boxes = visible_boxes(owner, len(areas))
        return bool((boxes[:, 2:] - boxes[:, :2]).min() >= self.drawing.minimum_box)

    def _filling(self, part: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """A colour (3,) or a texture (height, width, 3) that stands out from what is under the object."""
        rng = self.rng
        under = self.pixels[rows, columns][part > 0.5].mean(0)
        for _ in range(TRIES):
            if rng.random() < self.drawing.textured_objects:
                height, width = part.shape
                filling = FILLINGS[rng.integers(len(FILLINGS))](rng, max(part.shape))[:height, :width]
                colour = filling.mean((0, 1))
            else:
                filling = colour = rng.uniform(0, 255, 3)
            if np.linalg.norm(colour - under) >= self.drawing.minimum_contrast:
                break
        return filling

    def finish(self) -> np.ndarray:
        """Light, blur, noise and haze over everything; BGR uint8."""
        rng = self.rng
        light = 1 + rng.uniform(0, 0.35) * _ramp(rng, self.size) / self.size
        image = self.pixels * light[..., None].astype(np.float32)
        sigma = rng.uniform(0, self.drawing.blur)
        if sigma > 0.3:
            image = cv2.GaussianBlur(image, (0, 0), sigma)
        image += rng.uniform(0, self.drawing.noise) * rng.standard_normal(image.shape, np.float32)
        contrast = np.exp(rng.uniform(*np.log(self.drawing.contrast)))
        image = contrast * image + (1 - contrast) * rng.uniform(94, 134)
        return np.clip(np.round(image), 0, 255).astype(np.uint8)


def visible_boxes(owner: np.ndarray, count: int) -> np.ndarray:
    """The tight xyxy boxes (count, 4), in pixels, of the values 0 .. count - 1 in ``owner`` (height, width)."""
    boxes = np.zeros((count, 4), int)
    for number in range(count):
        left, top, width, height = cv2.boundingRect((owner == number).view(np.uint8))
        boxes[number] = left, top, left + width, top + height
    return boxes


def draw_image(rng: np.random.Generator, drawing: Drawing) -> tuple[np.ndarray, np.ndarray]:
    """One image.

    Returns:
        BGR uint8 (size, size, 3), and rows (n, 5) of class, left, top, right, bottom in pixels: the visible extents.
    """
    canvas = _Canvas(rng, drawing)
    count = int(rng.integers(drawing.objects[0], drawing.objects[1] + 1))
    # Permutations instead of draws keep the classes balanced.
    rounds = [rng.permutation(len(CLASSES)) for _ in range(-(-count // len(CLASSES)))]
    for category in np.concatenate(rounds)[:count]:
        canvas.add(int(category))
    boxes = visible_boxes(canvas.owner, len(canvas.categories))
    return canvas.finish(), np.concatenate([np.array(canvas.categories, int).reshape(-1, 1), boxes], 1)


# --- the data set
def draw_shapes(folder: str | Path, seed: int = 0, drawing: Drawing | None = None) -> Path:
    """Draws the data set into ``folder`` unless the same one lies there already.

    It is drawn beside ``folder`` and renamed when it is complete, so that a folder of this name is never half full,
    even if several processes start together. A folder that an older version or another seed drew is replaced.

    Raises:
        UserError: ``folder`` holds something else, or cannot be written to.
    """
    folder, drawing = Path(folder), drawing or Drawing()
    stamp = json.loads(json.dumps({"version": VERSION, "seed": seed, "classes": CLASSES, **asdict(drawing)}))
    if _read_stamp(folder) == stamp:
        return folder
    splits = {"train": drawing.train_images, "val": drawing.val_images}
    LOGGER.info(
        f"Drawing the shapes data set into {folder}: {splits['train']} training and {splits['val']} validation images, "
        f"{drawing.image_size}x{drawing.image_size} pixels, seed {seed}, classes {', '.join(CLASSES)}"
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            complete = Path(temporary, "complete")
            for number, (split, count) in enumerate(splits.items()):
                _draw_split(complete, split, count, [seed, number], drawing)
            Path(complete, STAMP_FILE).write_text(json.dumps(stamp, indent=1) + "\n")
            _move_into_place(complete, folder, stamp, Path(temporary, "old"))
    except OSError as error:
        raise UserError(
            f"{folder}: the shapes cannot be drawn there ({error.strerror or error}). "
            "Make the folder writable, or use a copy of shapes.yaml with another 'path'."
        ) from None
    return folder


def _draw_split(root: Path, split: str, count: int, seeds: list[int], drawing: Drawing) -> None:
    images, labels = root / "images" / split, root / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)

    def draw(index: int) -> None:
        image, rows = draw_image(np.random.default_rng([*seeds, index, VERSION]), drawing)
        write_image(images / f"{index:04d}.png", image)  # lossless: no decoder changes the pixels
        centres, sizes = (rows[:, 1:3] + rows[:, 3:]) / 2, rows[:, 3:] - rows[:, 1:3]
        boxes = np.concatenate([centres, sizes], 1) / drawing.image_size
        lines = [f"{row[0]} " + " ".join(f"{value:.6f}" for value in box) for row, box in zip(rows, boxes, strict=True)]
        (labels / f"{index:04d}.txt").write_text("".join(f"{line}\n" for line in lines))

    with ThreadPool(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(draw, range(count)))


def _read_stamp(folder: Path) -> dict | None:
    try:
        return json.loads((folder / STAMP_FILE).read_text())
    except (OSError, ValueError):
        return None


def _move_into_place(complete: Path, folder: Path, stamp: dict, old: Path) -> None:
    if folder.exists():
        found = _read_stamp(folder)
        if found == stamp:
            return  # another process was faster
        if found is None and any(folder.iterdir()):
            raise UserError(f"{folder}: holds something that was not drawn by data/shapes.py. Move it away.")
        os.replace(folder, old)
    try:
        os.replace(complete, folder)
    except OSError:
        if _read_stamp(folder) != stamp:
            raise
    shutil.rmtree(old, ignore_errors=True)
