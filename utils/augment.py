"""Augmentations of training images and their boxes.

Every function draws from the NumPy generator that it is given and from nothing else, so an image's augmentation depends
only on that generator's seed. Images are BGR uint8 (height, width, 3); labels are float32 (n, 5) rows of
class, left, top, right, bottom in pixels unless said otherwise.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from utils.boxes import clip_boxes
from utils.images import PADDING_VALUE

MINIMUM_SIDE = 2  # pixels; a box that is thinner after the warp is dropped
MINIMUM_AREA_LEFT = 0.10  # share of its area that a box must keep when it is cut by the image's edge
MAXIMUM_ASPECT = 100


def shift_hsv(image: np.ndarray, rng: np.random.Generator, hue: float, saturation: float, value: float) -> np.ndarray:
    """Multiplies hue, saturation and value by 1 + uniform(-1, 1) * their gain; hue wraps, the others saturate.

    Gray pixels have no saturation to multiply, so they stay gray.
    """
    if not (hue or saturation or value):
        return image
    gains = 1 + rng.uniform(-1, 1, 3) * (hue, saturation, value)
    levels = np.arange(256)
    table = np.empty((1, 256, 3), np.uint8)
    table[0, :, 0] = (levels * gains[0]) % 180  # OpenCV's hue is in units of 2 degrees
    table[0, :, 1] = np.clip(levels * gains[1], 0, 255)
    table[0, :, 2] = np.clip(levels * gains[2], 0, 255)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), table), cv2.COLOR_HSV2BGR)


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
    image: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    to_shape: Sequence[int] | None = None,
    degrees: float = 0.0,
    translate: float = 0.1,
    scale: float = 0.5,
    shear: float = 0.0,
    perspective: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotates, scales, shears, moves and tilts an image into ``to_shape`` (height, width; default: its own shape).

    Boxes become the upright boxes around their mapped corners, clipped; ``keep_boxes`` says which remain.
    """
    to_shape = tuple(to_shape or image.shape[:2])
    matrix, factor = draw_perspective_matrix(rng, image.shape, to_shape, degrees, translate, scale, shear, perspective)
    if to_shape == image.shape[:2] and np.array_equal(matrix, np.eye(3)):
        return image, labels
    target = {"dsize": (to_shape[1], to_shape[0]), "borderValue": (PADDING_VALUE,) * 3}
    if perspective:
        image = cv2.warpPerspective(image, matrix, **target)
    else:
        image = cv2.warpAffine(image, matrix[:2], **target)
    if not len(labels):
        return image, labels
    boxes = clip_boxes(warp_boxes(labels[:, 1:], matrix), to_shape)
    keep = keep_boxes(labels[:, 1:] * factor, boxes)
    return image, np.concatenate([labels[keep, :1], boxes[keep]], 1).astype(np.float32)


def mosaic(
    images: Sequence[np.ndarray], labels: Sequence[np.ndarray], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Puts four images around a random point of a canvas of twice the size: top left, top right, bottom left and right.

    Args:
        images: four images, neither side longer than ``size``.
        labels: four arrays (n, 5) of class and *normalised* xywh.
        size: the side of the image that is to be cut from the canvas.

    Returns:
        The canvas and the labels (m, 5) in pixels of it, clipped to it.
    """
    side = 2 * size
    canvas = np.full((side, side, 3), PADDING_VALUE, np.uint8)
    centre_x, centre_y = (int(rng.uniform(size / 2, side - size / 2)) for _ in range(2))
    placed = []
    for position, (image, rows) in enumerate(zip(images, labels, strict=True)):
        height, width = image.shape[:2]
        left = centre_x - width if position in (0, 2) else centre_x
        top = centre_y - height if position in (0, 1) else centre_y
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, side), min(top + height, side)
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
        placed.append(denormalise_labels(rows, width, height, left, top))
    placed = np.concatenate(placed)
    placed[:, 1:] = placed[:, 1:].clip(0, side)
    return canvas, placed


def denormalise_labels(
    labels: np.ndarray, width: float, height: float, pad_width: float = 0, pad_height: float = 0
) -> np.ndarray:
    """Rows (n, 5) of class and normalised xywh to class and xyxy in pixels, moved by the padding."""
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
