"""Anchors that fit a data set: the check before training, and k-means with a genetic search where they do not."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from utils.log import LOGGER
from utils.progress import progress

GOOD_RECALL = 0.98  # anchors are left alone while this share of the boxes has an anchor that may answer for it
SMALLEST_SIDE = 2.0  # pixels; boxes with both sides below it are not worth an anchor


def scaled_box_sizes(
    shapes: np.ndarray, labels: Sequence[np.ndarray], image_size: int, jitter: np.random.Generator | None = None
) -> np.ndarray:
    """Widths and heights of all boxes in pixels of the network's input.

    Args:
        shapes: (images, 2) width and height of each image.
        labels: per image (n, 5) rows class, centre x, centre y, width, height; normalised.
        image_size: the long side of every image is scaled to it.
        jitter: scales each image's boxes by a random factor of 0.9 to 1.1, as augmentation will.

    Returns:
        (boxes, 2).
    """
    shapes = np.asarray(shapes, dtype=float)
    scaled = image_size * shapes / shapes.max(1, keepdims=True)
    if jitter is not None:
        scaled = scaled * jitter.uniform(0.9, 1.1, size=(len(shapes), 1))
    counts = [len(rows) for rows in labels]
    sizes = np.concatenate(
        [np.asarray(rows, dtype=float).reshape(-1, 5)[:, 3:5] for rows in labels] or [np.zeros((0, 2))]
    )
    return sizes * np.repeat(scaled, counts, axis=0)


def fit_ratio(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """How well each anchor (A, 2) fits each box (n, 2): the worse side's ratio, turned to lie in 0..1; (n, A)."""
    ratio = sizes[:, None] / anchors[None]
    return np.minimum(ratio, 1 / ratio).min(2)


def best_possible_recall(sizes: np.ndarray, anchors: np.ndarray, anchor_threshold: float) -> tuple[float, float]:
    """Share of the boxes that some anchor may answer for, and the mean number of such anchors per box."""
    if not len(sizes):
        return 1.0, 0.0
    fits = fit_ratio(sizes, anchors)
    return float((fits.max(1) > 1 / anchor_threshold).mean()), float((fits > 1 / anchor_threshold).sum(1).mean())


def anchor_fitness(sizes: np.ndarray, anchors: np.ndarray, anchor_threshold: float) -> float:
    """Mean over boxes of the best ratio, counted as zero where it is too poor for an answer."""
    best = fit_ratio(sizes, anchors).max(1)
    return float((best * (best > 1 / anchor_threshold)).mean())


def kmeans(points: np.ndarray, number: int, generator: np.random.Generator, iterations: int = 30) -> np.ndarray:
    """Lloyd's k-means from centres drawn among the points (k-means++); returns (number, dimensions) centres."""
    centres = points[generator.integers(len(points))][None]
    while len(centres) < number:
        distance = ((points[:, None] - centres[None]) ** 2).sum(2).min(1)
        total = distance.sum()
        chances = distance / total if total > 0 else None
        centres = np.concatenate((centres, points[generator.choice(len(points), p=chances)][None]))
    for _ in range(iterations):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        counts = np.bincount(nearest, minlength=number)
        sums = np.stack([np.bincount(nearest, points[:, axis], number) for axis in range(points.shape[1])], 1)
        # An empty cluster keeps its centre.
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
        if np.allclose(moved, centres):
            break
        centres = moved
    return centres


def kmean_anchors(
    shapes: np.ndarray,
    labels: Sequence[np.ndarray],
    number: int = 9,
    image_size: int = 640,
    anchor_threshold: float = 4.0,
    generations: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Finds anchors for a data set: k-means on box sizes, then random mutations that improve ``anchor_fitness``.

    Returns:
        (number, 2) widths and heights in pixels at ``image_size``, by rising area.
    """
    generator = np.random.default_rng(seed)
    every = scaled_box_sizes(shapes, labels, image_size)
    sizes = every[(every >= SMALLEST_SIDE).any(1)]
    tiny = int((every < 3.0).any(1).sum())
    if tiny:
        LOGGER.warning(f"anchors: {tiny} of {len(every)} boxes are under 3 pixels wide or high at {image_size} pixels")
    distinct = len(np.unique(sizes.round(3), axis=0))
    if distinct < number:
        LOGGER.warning(f"anchors: {distinct} different box sizes for {number} anchors: random anchors to start with")
        anchors = generator.uniform(SMALLEST_SIDE, image_size, (number, 2))
    else:
        spread = sizes.std(0)
        spread = np.where(spread > 0, spread, 1.0)
        anchors = kmeans(sizes / spread, number, generator) * spread
    anchors = np.maximum(anchors, SMALLEST_SIDE)
    if len(sizes):
        anchors = _mutate(anchors, sizes, anchor_threshold, generations, generator)
    return anchors[anchors.prod(1).argsort()]


def _mutate(
    anchors: np.ndarray, sizes: np.ndarray, threshold: float, generations: int, generator: np.random.Generator
) -> np.ndarray:
    """Hill climbing: every side is multiplied with probability 0.9 by a factor around 1, kept if fitness rises."""
    best = anchor_fitness(sizes, anchors, threshold)
    for _ in progress(range(generations), "looking for anchors"):
        touched = generator.random(anchors.shape) < 0.9
        steps = touched * generator.random() * generator.normal(size=anchors.shape) * 0.1 + 1
        candidate = np.maximum(anchors * steps.clip(0.3, 3.0), SMALLEST_SIDE)
        value = anchor_fitness(sizes, candidate, threshold)
        if value > best:
            best, anchors = value, candidate
    return anchors


def check_anchors(
    shapes: np.ndarray,
    labels: Sequence[np.ndarray],
    detect: nn.Module,
    image_size: int = 640,
    anchor_threshold: float = 4.0,
    seed: int = 0,
) -> bool:
    """Looks whether a Detect head's anchors fit the data, and replaces them in place if better ones are found.

    Args:
        shapes: (images, 2) width and height of each image.
        labels: per image (n, 5) rows class and normalised box.
        detect: has ``anchors`` (levels, A, 2) in units of ``stride`` (levels,).

    Returns:
        Whether the anchors were replaced.
    """
    stride = detect.stride.detach().cpu().double().numpy().reshape(-1, 1, 1)
    current = (detect.anchors.detach().cpu().double().numpy() * stride).reshape(-1, 2)
    sizes = scaled_box_sizes(shapes, labels, image_size, np.random.default_rng(seed))
    recall, per_box = best_possible_recall(sizes, current, anchor_threshold)
    start = f"anchors: {per_box:.2f} anchors per box, best possible recall {recall:.4f}"
    if recall > GOOD_RECALL:
        LOGGER.info(f"{start}: they fit the data set")
        return False
    LOGGER.info(f"{start}: too low, looking for better ones ...")
    found = kmean_anchors(shapes, labels, len(current), image_size, anchor_threshold, seed=seed)
    better, _ = best_possible_recall(sizes, found, anchor_threshold)
    if better <= recall:
        LOGGER.info(f"anchors: the ones found are no better (recall {better:.4f}): the old ones stay")
        return False
    # Levels go from fine to coarse or the other way round; the smallest anchors belong to the finest.
    if len(stride) > 1 and stride[-1] < stride[0]:
        found = found[::-1]
    levels = found.reshape(detect.anchors.shape) / stride
    with torch.no_grad():
        detect.anchors.copy_(torch.as_tensor(levels.copy(), dtype=detect.anchors.dtype))
    text = ", ".join(f"{round(width)}x{round(height)}" for width, height in found)
    LOGGER.info(f"anchors: replaced, best possible recall {better:.4f}: {text}")
    return True
