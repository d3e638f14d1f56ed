"""How often images are drawn with ``--image-weights``: by how rare and how badly found the classes on them are."""

import numpy as np

from utils.packed import PackedRows


def class_weights(classes: np.ndarray, number: int) -> np.ndarray:
    """Inverse frequency of each class.

    Args:
        classes: (n,) class of every label.
        number: of classes; one that never occurs counts as if it occurred once.

    Returns:
        (number,) with a sum of 1.
    """
    counts = np.bincount(classes.astype(int), minlength=number)
    weights = 1 / np.maximum(counts, 1)
    return weights / weights.sum()


def image_weights(labels: PackedRows, average_precision: np.ndarray) -> np.ndarray:
    """The probability with which each image is drawn.

    An image counts the weight of each of its labels: the class' inverse frequency times (1 - average precision)^2.
    Images without a label are never drawn, unless no image has any weight: then all are alike.

    Args:
        labels: per image (n_i, 5), class first.
        average_precision: (classes,) mAP50-95 of each class at the last validation; zeros before the first one.

    Returns:
        (images,) with a sum of 1.
    """
    of_class = class_weights(labels.rows[:, 0], len(average_precision)) * (1 - average_precision) ** 2
    image = np.repeat(np.arange(len(labels)), labels.counts)
    weights = np.bincount(image, of_class[labels.rows[:, 0].astype(int)], minlength=len(labels))
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(labels), 1 / max(len(labels), 1))
