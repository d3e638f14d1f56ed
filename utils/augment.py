"""Augmentations of training images and their boxes.

Every function draws from the NumPy generator that it is given and from nothing else, so an image's augmentation depends
only on that generator's seed. Images are BGR uint8 (height, width, 3); labels are float32 (n, 5) rows of
class, left, top, right, bottom in pixels unless said otherwise.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from utils.boxes import clip_boxes
from utils.canvas import Canvas, Tile
from utils.images import PADDING_VALUE

MINIMUM_SIDE = 2  # pixels; a box that is thinner after the warp is dropped
MINIMUM_AREA_LEFT = 0.10  # share of its area that a box must keep when it is cut by the image's edge
MAXIMUM_ASPECT = 100
MOST_HIDDEN = 0.30  # share of its area that a pasted object may hide of another
SMALLEST_RESIZE = 0.25  # scale; what is seen of a mosaic has four times its pixels there, and warping it is cheaper


def shift_hsv(image: np.ndarray, rng: np.random.Generator, hue: float, saturation: float, value: float) -> np.ndarray:
    """Multiplies hue, saturation and value by 1 + uniform(-1, 1) * their gain; hue wraps, the others saturate.

    Products are rounded. Gray pixels have no saturation to multiply, so they stay gray.
    """
    if not (hue or saturation or value):
        return image
    gains = 1 + rng.uniform(-1, 1, 3) * (hue, saturation, value)
    pixels = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    if 0 <= gains[0] <= 255 / 179:
        # OpenCV's hue ends at 179 (2 degrees each) but wraps by itself on the way back, so one saturating product does.
        pixels = cv2.transform(pixels, np.diag(gains))
    else:
        levels = np.rint(np.arange(256)[:, None] * gains)
        levels[:, 0] %= 180
        pixels = cv2.LUT(pixels, levels.clip(0, 255).astype(np.uint8)[None])
    return cv2.cvtColor(pixels, cv2.COLOR_HSV2BGR)


def flip(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, up_down: float, left_right: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mirrors with the two given probabilities. Both draws are made always, so one does not shift the other."""
    flip_vertical, flip_horizontal = rng.random(2) < (up_down, left_right)
    height, width = image.shape[:2]
    if flip_vertical:
        image = cv2.flip(image, 0)
        labels = labels[:, [0, 1, 4, 3, 2]] * (1, 1, -1, 1, -1) + (0, 0, height, 0, height)
    if flip_horizontal:
        image = cv2.flip(image, 1)
        labels = labels[:, [0, 3, 2, 1, 4]] * (1, -1, 1, -1, 1) + (0, width, 0, width, 0)
    return image, labels.astype(np.float32, copy=False)


def draw_perspective_matrix(
    rng: np.random.Generator,
    from_shape: Sequence[int],
    to_shape: Sequence[int],
    degrees: float = 0.0,
    translate: float = 0.1,
    scale: float = 0.5,
    shear: float = 0.0,
    perspective: float = 0.0,
) -> tuple[np.ndarray, float]:
    """A random 3x3 map from pixels of an image of ``from_shape`` to one of ``to_shape`` (both height, width).

    It centres the image on the origin, then applies perspective, rotation by up to ``degrees`` with a scale in
    1 +- ``scale``, shear by up to ``shear`` degrees, and puts the centre at (0.5 +- ``translate``) of the result.

    Returns:
        The matrix and the scale that was drawn.
    """
    centre = np.eye(3)
    centre[:2, 2] = -from_shape[1] / 2, -from_shape[0] / 2
    tilt = np.eye(3)
    tilt[2, :2] = rng.uniform(-perspective, perspective, 2)
    angle = rng.uniform(-degrees, degrees)
    factor = rng.uniform(1 - scale, 1 + scale)
    rotation = np.eye(3)
    rotation[:2] = cv2.getRotationMatrix2D(center=(0, 0), angle=angle, scale=factor)
    skew = np.eye(3)
    skew[0, 1], skew[1, 0] = np.tan(np.radians(rng.uniform(-shear, shear, 2)))
    position = np.eye(3)
    position[:2, 2] = rng.uniform(0.5 - translate, 0.5 + translate, 2) * (to_shape[1], to_shape[0])
    return position @ skew @ rotation @ tilt @ centre, factor


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The upright boxes (n, 4) around the four mapped corners of ``boxes`` (n, 4), all xyxy, not clipped."""
    corners = np.ones((len(boxes), 4, 3))
    corners[..., :2] = boxes[:, [0, 1, 2, 3, 0, 3, 2, 1]].reshape(-1, 4, 2)
    mapped = corners @ matrix.T
    points = mapped[..., :2] / mapped[..., 2:]
    return np.concatenate([points.min(1), points.max(1)], 1)


def keep_boxes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which boxes (n, 4) are still worth learning after a warp and clipping: a mask (n,).

    Args:
        before: the boxes before clipping at the scale of ``after``: their area is what a box could have kept.
    """
    width, height = (after[:, 2:] - after[:, :2]).T
    old_width, old_height = (before[:, 2:] - before[:, :2]).T
    aspect = np.maximum(width / (height + 1e-16), height / (width + 1e-16))
    large_enough = (width > MINIMUM_SIDE) & (height > MINIMUM_SIDE)
    whole_enough = width * height / (old_width * old_height + 1e-16) > MINIMUM_AREA_LEFT
    return large_enough & whole_enough & (aspect < MAXIMUM_ASPECT)


def random_perspective(
    canvas: Canvas,
    labels: np.ndarray,
    rng: np.random.Generator,
    to_shape: Sequence[int] | None = None,
    degrees: float = 0.0,
    translate: float = 0.1,
    scale: float = 0.5,
    shear: float = 0.0,
    perspective: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotates, scales, shears, moves and tilts a canvas into ``to_shape`` (height, width; default: its own shape).

    Boxes become the upright boxes around their mapped corners, clipped; ``keep_boxes`` says which remain. The image may
    share memory with the canvas.

    Without rotation, shear and perspective (YOLOv5's defaults) position and scale are rounded so that the image is a
    whole number of the canvas' pixels: that part is resized, in a quarter to half of the time of an affine warp.
    """
    to_shape = tuple(to_shape or canvas.shape)
    matrix, factor = draw_perspective_matrix(rng, canvas.shape, to_shape, degrees, translate, scale, shear, perspective)
    if to_shape == canvas.shape and np.array_equal(matrix, np.eye(3)):
        return canvas.draw(0, 0, canvas.width, canvas.height), labels
    if degrees or shear or perspective or factor < SMALLEST_RESIZE:
        image = warp(canvas, matrix, to_shape)
    else:
        left, top, width, height = visible_rectangle(matrix, to_shape)
        image = canvas.draw(left, top, width, height)
        if (height, width) != to_shape:
            image = cv2.resize(image, (to_shape[1], to_shape[0]), interpolation=cv2.INTER_LINEAR)
        across, down = to_shape[1] / width, to_shape[0] / height
        matrix = np.array([[across, 0, -left * across], [0, down, -top * down], [0, 0, 1]])
        factor = math.sqrt(across * down)
    if not len(labels):
        return image, labels
    boxes = clip_boxes(warp_boxes(labels[:, 1:], matrix), to_shape)
    keep = keep_boxes(labels[:, 1:] * factor, boxes)
    return image, np.concatenate([labels[keep, :1], boxes[keep]], 1).astype(np.float32)


def visible_rectangle(matrix: np.ndarray, to_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """What a map that only scales and moves shows of its source: left, top, width, height, in whole pixels."""
    height, width = to_shape
    return (
        round(-matrix[0, 2] / matrix[0, 0]),
        round(-matrix[1, 2] / matrix[1, 1]),
        max(round(width / matrix[0, 0]), 1),
        max(round(height / matrix[1, 1]), 1),
    )


def warp(canvas: Canvas, matrix: np.ndarray, to_shape: Sequence[int]) -> np.ndarray:
    """The canvas through a 3x3 map of coordinates into an image of ``to_shape`` (height, width), grey outside.

    Only the part of the canvas that the image can show is drawn. Coordinates, like those of boxes, count from pixels'
    edges; OpenCV's count from their centres, which lie at halves.
    """
    height, width = to_shape
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]]) @ np.linalg.inv(matrix).T
    left = top = 0
    right, bottom = canvas.width, canvas.height
    if corners[:, 2].min() > 1e-6:  # else a horizon runs through the image, and no finite part holds what it shows
        points = corners[:, :2] / corners[:, 2:]
        # Two pixels more than the corners: interpolation reads the neighbours.
        left, top = np.clip(np.floor(points.min(0)) - 2, 0, (right - 1, bottom - 1)).astype(int).tolist()
        right, bottom = np.clip(np.ceil(points.max(0)) + 2, (left + 1, top + 1), (right, bottom)).astype(int).tolist()
    region = canvas.draw(left, top, right - left, bottom - top)
    pixels = shift_matrix(-0.5, -0.5) @ matrix @ shift_matrix(left + 0.5, top + 0.5)
    target = {"dsize": (width, height), "borderValue": (PADDING_VALUE,) * 3}
    if np.allclose(matrix[2], (0, 0, 1), rtol=0, atol=1e-12):
        return cv2.warpAffine(region, pixels[:2], **target)
    return cv2.warpPerspective(region, pixels, **target)


def shift_matrix(x: float, y: float) -> np.ndarray:
    """The 3x3 map that adds (x, y)."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])


def mosaic(
    tiles: Sequence[Tile], labels: Sequence[np.ndarray], size: int, rng: np.random.Generator
) -> tuple[Canvas, np.ndarray]:
    """Puts four images around a random point of a canvas of twice the size: top left, top right, bottom left and right.

    Args:
        tiles: four images, neither side longer than ``size``; their places are not read.
        labels: four arrays (n, 5) of class and *normalised* xywh.
        size: the side of the image that is to be cut from the canvas.

    Returns:
        The canvas and the labels (m, 5) in pixels of it, clipped to it.
    """
    side = 2 * size
    centre_x, centre_y = (int(rng.uniform(size / 2, side - size / 2)) for _ in range(2))
    placed = []
    for position, tile in enumerate(tiles):
        left = centre_x - tile.width if position in (0, 2) else centre_x
        top = centre_y - tile.height if position in (0, 1) else centre_y
        placed.append(tile.at(left, top))
    geometry = np.array([(tile.width, tile.height, tile.left, tile.top) for tile in placed], np.float32)
    of_each_row = np.repeat(geometry, [len(rows) for rows in labels], axis=0)
    pixels = denormalise_labels(np.concatenate(labels), *of_each_row.T)
    np.clip(pixels[:, 1:], 0, side, out=pixels[:, 1:])
    return Canvas(placed, side, side), pixels


def denormalise_labels(
    labels: np.ndarray,
    width: float | np.ndarray,
    height: float | np.ndarray,
    pad_width: float | np.ndarray = 0,
    pad_height: float | np.ndarray = 0,
) -> np.ndarray:
    """Rows (n, 5) of class and normalised xywh to class and xyxy in pixels, moved by the padding.

    Sizes and padding are those of one image or, as arrays (n,), of each row's.
    """
    pixels = np.empty_like(labels, dtype=np.float32)
    pixels[:, 0] = labels[:, 0]
    half_width, half_height = labels[:, 3] / 2, labels[:, 4] / 2
    pixels[:, 1] = width * (labels[:, 1] - half_width) + pad_width
    pixels[:, 2] = height * (labels[:, 2] - half_height) + pad_height
    pixels[:, 3] = width * (labels[:, 1] + half_width) + pad_width
    pixels[:, 4] = height * (labels[:, 2] + half_height) + pad_height
    return pixels


def mixup(
    image: np.ndarray, labels: np.ndarray, other: np.ndarray, other_labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of two images, weighted by Beta(32, 32), with the labels of both (Zhang et al., arXiv 1710.09412)."""
    share = rng.beta(32.0, 32.0)
    mixed = cv2.addWeighted(image, share, other, 1 - share, 0)
    return mixed, np.concatenate([labels, other_labels])


def copy_paste(
    image: np.ndarray,
    labels: np.ndarray,
    polygons: Sequence[np.ndarray | None],
    probability: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Pastes objects once more, mirrored to the other side of the image (Ghiasi et al., arXiv 2012.07177).

    A share ``probability`` of the objects with an outline is tried; one that would hide 30 % or more of another label's
    box is left out.

    Args:
        image: (height, width, 3); it is not changed.
        labels: (n, 5) class and xyxy in pixels.
        polygons: n outlines (corners, 2) in pixels, or None.

    Returns:
        The image and the labels (m, 5), the new ones behind the old ones.
    """
    outlined = [number for number, polygon in enumerate(polygons) if polygon is not None]
    tried = rng.permutation(outlined)[: round(probability * len(outlined))].astype(int)
    height, width = image.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    for number in tried:
        category, left, top, right, bottom = labels[number]
        box = np.array([width - right, top, width - left, bottom], np.float32)
        if (_share_hidden(box, labels[:, 1:]) < MOST_HIDDEN).all():
            labels = np.concatenate([labels, [[category, *box]]]).astype(np.float32)
            cv2.drawContours(mask, [np.rint(polygons[number]).astype(np.int32)], -1, 1, cv2.FILLED)
    if not mask.any():
        return image, labels
    return np.where(cv2.flip(mask, 1)[..., None] > 0, cv2.flip(image, 1), image), labels


def _share_hidden(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The share of each of ``boxes`` (n, 4) that lies in ``box`` (4,), all xyxy."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    return sides.clip(0).prod(1) / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + 1e-7)
