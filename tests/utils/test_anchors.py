from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from utils.anchors import best_possible_recall, check_anchors, fit_ratio, kmean_anchors, kmeans, scaled_box_sizes

P5 = np.array(
    [[10, 13], [16, 30], [33, 23], [30, 61], [62, 45], [59, 119], [116, 90], [156, 198], [373, 326]], dtype=float
)


def detect(anchors=P5, stride=(8.0, 16.0, 32.0)):
    stride = torch.tensor(stride)
    return SimpleNamespace(anchors=torch.tensor(anchors).float().view(3, 3, 2) / stride.view(3, 1, 1), stride=stride)


def data_set(low, high, images=20, boxes=15, seed=0):
    generator = np.random.default_rng(seed)
    rows = [np.concatenate((np.zeros((boxes, 3)), generator.uniform(low, high, (boxes, 2))), 1) for _ in range(images)]
    return np.tile([640, 480], (images, 1)), rows


def test_sizes_and_ratios():
    shapes = np.array([[320, 160], [100, 200]])
    labels = [np.array([[0, 0.5, 0.5, 0.5, 0.25]]), np.zeros((0, 5))]
    assert scaled_box_sizes(shapes, labels, 640).tolist() == [[320, 80]]
    ratio = fit_ratio(np.array([[20.0, 10.0]]), np.array([[10.0, 10.0], [40.0, 40.0]]))
    assert ratio.tolist() == [[0.5, 0.25]]


def test_recall_equals_loops():
    generator = np.random.default_rng(0)
    sizes = generator.uniform(1, 600, (200, 2))
    fits = [[max(w / a, a / w, h / b, b / h) < 4 for a, b in P5[:3]] for w, h in sizes]
    recall, mean = best_possible_recall(sizes, P5[:3], 4.0)
    assert recall == pytest.approx(np.mean([any(row) for row in fits]))
    assert mean == pytest.approx(np.mean([sum(row) for row in fits]))


def test_kmeans_reaches_scipys_error():
    generator = np.random.default_rng(0)
    centres = generator.uniform(0, 100, (5, 2))
    points = np.concatenate([centre + generator.normal(0, 1, (60, 2)) for centre in centres])
    ours = kmeans(points, 5, generator)
    theirs, _ = kmeans2(points, centres, iter=30, minit="matrix")

    def error(found):
        return ((points[:, None] - found[None]) ** 2).sum(2).min(1).mean()

    assert error(ours) <= error(theirs) * 1.3


def test_fitting_anchors_stay():
    shapes, labels = data_set(0.03, 0.5)
    head = detect()
    before = head.anchors.clone()
    assert not check_anchors(shapes, labels, head)
    assert torch.equal(head.anchors, before)


def test_anchors_are_replaced_for_tiny_boxes():
    shapes, labels = data_set(0.002, 0.006)
    head = detect()
    assert check_anchors(shapes, labels, head)
    pixels = (head.anchors * head.stride.view(3, 1, 1)).view(-1, 2).double().numpy()
    recall, _ = best_possible_recall(scaled_box_sizes(shapes, labels, 640), pixels, 4.0)
    assert recall > 0.98
    area = pixels.prod(1)
    assert (area[1:] >= area[:-1]).all() and pixels.min() >= 2


def test_order_follows_the_strides():
    shapes, labels = data_set(0.002, 0.006)
    head = detect(stride=(32.0, 16.0, 8.0))
    assert check_anchors(shapes, labels, head)
    area = (head.anchors * head.stride.view(3, 1, 1)).prod(2)
    assert area[0].min() >= area[2].max()


def test_repeatable_and_few_boxes():
    shapes, labels = data_set(0.05, 0.4)
    first = kmean_anchors(shapes, labels, 6, generations=50)
    assert np.array_equal(first, kmean_anchors(shapes, labels, 6, generations=50))
    few = kmean_anchors(shapes[:1], [labels[0][:2]], 9, generations=10)
    assert few.shape == (9, 2) and np.isfinite(few).all()
    assert kmean_anchors(shapes[:1], [np.zeros((0, 5))], 9, generations=10).shape == (9, 2)
