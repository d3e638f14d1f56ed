"""Intervals for accuracies: a bootstrap over the images of the test split, and over the seeds of the trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.metrics import RECALL_AXIS, STRICT_COLUMN
from val import Samples

RESAMPLES = 400


@dataclass
class Counts:
    """What AP50 and AP75 of one network depend on: detections, most confident first, and labels of each image.

    Attributes:
        image: (n,) number of each detection's image.
        predicted: (n,) its class.
        correct: (n, 2) bool, at IoU 0.5 and 0.75.
        labels: (images, classes) number of labels.
    """

    image: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, samples: Samples, images: int, classes: int) -> Counts:
        """The counts of an evaluation of ``images`` images."""
        order = np.argsort(-samples.scores, kind="stable")
        labels = np.zeros((images, classes), np.int32)
        np.add.at(labels, (samples.label_image, samples.actual.astype(int)), 1)
        correct = samples.correct[order][:, [0, STRICT_COLUMN]]
        return cls(samples.image[order].astype(np.int32), samples.predicted[order].astype(np.int16), correct, labels)

    def save(self, file: Path) -> None:
        """Writes a compressed .npz file."""
        np.savez_compressed(file, image=self.image, predicted=self.predicted, correct=self.correct, labels=self.labels)

    @classmethod
    def load(cls, file: Path) -> Counts:
        """Reads what ``save`` wrote."""
        with np.load(file) as stored:
            return cls(**{name: stored[name] for name in ("image", "predicted", "correct", "labels")})


def draw_images(images: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(resamples + 1, images) how often each image is drawn; the first row is the set as it is."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(images, np.full(images, 1 / images), size=resamples)
    return np.concatenate([np.ones((1, images), drawn.dtype), drawn])


def resampled_map(counts: Counts, weights: np.ndarray) -> np.ndarray:
    """mAP50 and mAP75 of every resample, by the definition of ``utils.metrics`` (101 recalls, falling envelope).

    Args:
        weights: (R, images) from ``draw_images``.

    Returns:
        (R, 2), means over the classes that a resample has labels of.
    """
    per_label = weights @ counts.labels  # (R, classes)
    total, present = np.zeros((len(weights), 2)), np.zeros(len(weights))
    for label in np.flatnonzero(counts.labels.any(0)):
        chosen = counts.predicted == label
        correct, image = counts.correct[chosen], counts.image[chosen]
        for row in np.flatnonzero(per_label[:, label]):
            present[row] += 1
            if len(image):
                total[row] += _weighted_ap(correct, weights[row, image], per_label[row, label])
    return total / np.maximum(present, 1)[:, None]


def _weighted_ap(correct: np.ndarray, weight: np.ndarray, labels: int) -> np.ndarray:
    """(2,) AP of detections (n, 2), most confident first, each counted ``weight`` times."""
    kept = weight > 0
    correct, weight = correct[kept], weight[kept]
    hits = np.cumsum(correct * weight[:, None], 0)
    precision = hits / np.cumsum(weight)[:, None]
    found = np.zeros(2)
    for column in range(2):
        recall = np.concatenate(([0.0], hits[:, column] / labels, [1.0]))
        curve = np.concatenate(([1.0], precision[:, column], [0.0]))
        envelope = np.maximum.accumulate(curve[::-1])[::-1]
        sampled = np.interp(RECALL_AXIS, recall, envelope)
        found[column] = ((sampled[1:] + sampled[:-1]) / 2 * np.diff(RECALL_AXIS)).sum()
    return found


def seed_draws(seeds: int, resamples: int = RESAMPLES, seed: int = 1) -> np.ndarray:
    """(resamples + 1, seeds) indices drawn with replacement; the first row is each seed once."""
    generator = np.random.default_rng(seed)
    return np.concatenate([np.arange(seeds)[None], generator.integers(seeds, size=(resamples, seeds))])


def mean_over_seeds(values: np.ndarray) -> np.ndarray:
    """Means over redrawn seeds: (S, R) of S seeds and R resamples, the first of which is the set itself -> (R,)."""
    draws = seed_draws(len(values), values.shape[1] - 1)
    return np.take_along_axis(values.T, draws, 1).mean(1)


def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """The central ``share`` of the resamples (R,), without the first, which is no resample."""
    return tuple(np.quantile(values[1:], [(1 - share) / 2, (1 + share) / 2]).tolist())
