import numpy as np
import pytest

from utils.image_weights import class_weights, image_weights
from utils.packed import PackedRows


def packed(*classes):
    return PackedRows.of([np.array([[c, 0, 0, 1, 1] for c in image]).reshape(-1, 5) for image in classes], 5)


def test_weights_equal_loops_over_the_labels():
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 4, generator.integers(0, 6)).tolist() for _ in range(20)]
    scores = generator.random(5)
    everything = [c for image in images for c in image]
    frequency = {c: max(everything.count(c), 1) for c in range(5)}
    total = sum(1 / count for count in frequency.values())
    expected = np.array([sum((1 - scores[c]) ** 2 / frequency[c] / total for c in image) for image in images])
    weights = image_weights(packed(*images), scores)
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-6)
    assert class_weights(np.array(everything), 5).sum() == pytest.approx(1)


def test_images_without_weight():
    np.testing.assert_allclose(image_weights(packed([0], [], [1, 1]), np.zeros(2)), [0.5, 0, 0.5])
    np.testing.assert_allclose(image_weights(packed([0], [0]), np.ones(1)), [0.5, 0.5])  # all found: all alike
