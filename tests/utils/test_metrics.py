import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.coco import COCO_CATEGORY_IDS, coco_evaluate, detection_rows, ground_truth, image_identifiers
from utils.errors import UserError
from utils.iou import box_iou
from utils.metrics import (
    IOU_THRESHOLDS,
    ConfusionMatrix,
    ap_per_class,
    compute_ap,
    fitness,
    match_boxes,
    match_predictions,
    matched_boxes,
)

THRESHOLDS = torch.tensor(IOU_THRESHOLDS)


def scene(generator, labels=8, classes=3, spread=400, fewest=0, noise=0.12, sure=0.8):
    """Labels (m, 5) far apart and detections (n, 6) near some of them, each detection with one possible partner."""
    cell = generator.permutation(16)[:labels]
    corner = np.stack((cell % 4, cell // 4), 1) * spread / 4
    size = generator.uniform(20, spread / 4 - 10, (labels, 2))
    truth = np.concatenate((generator.integers(classes, size=(labels, 1)), corner, corner + size), 1)
    rows = []
    for label, x1, y1, x2, y2 in truth:
        for _ in range(generator.integers(fewest, 4)):
            shift = generator.normal(0, noise, 4) * np.array([x2 - x1, y2 - y1] * 2)
            guess = label if generator.random() < sure else generator.integers(classes)
            rows.append([*(np.array([x1, y1, x2, y2]) + shift), generator.random(), guess])
    found = torch.tensor(np.array(rows).reshape(-1, 6)).float()
    return found[found[:, 4].argsort(descending=True)], torch.tensor(truth).float()


def slow_match(found, truth, threshold):
    """Best label of each detection, most confident first, each label once."""
    taken, right = set(), []
    for row in found:
        overlaps = box_iou(row[None, :4], truth[:, 1:])[0]
        same = [i for i in range(len(truth)) if truth[i, 0] == row[5] and overlaps[i] >= threshold]
        best = max(same, key=lambda i: overlaps[i].item(), default=None)
        right.append(best is not None and best not in taken)
        if right[-1]:
            taken.add(best)
    return right


def test_known_average_precisions():
    first = compute_ap(np.array([0.1, 0.2, 0.5, 0.5, 0.8]), np.array([1, 1, 0.75, 0.6, 0.5]))[0]
    second = compute_ap(np.array([0.25, 0.5, 0.75]), np.array([1, 0.5, 0.6]))[0]
    assert (first, second) == pytest.approx((0.67675, 0.675), abs=1e-6)


def test_fitness():
    assert fitness(0.7, 0.4) == pytest.approx(0.43)


@pytest.mark.parametrize("seed", range(5))
def test_matching_equals_loops(seed):
    generator = np.random.default_rng(seed)
    found, truth = scene(generator)
    truth[1:3, 1:] = truth[0, 1:] + torch.tensor([[2.0], [4.0]])  # labels that overlap each other
    ours = match_predictions(found, truth, THRESHOLDS)
    for column, threshold in enumerate(IOU_THRESHOLDS):
        assert ours[:, column].tolist() == slow_match(found, truth, threshold)
    assert match_predictions(found[:0], truth, THRESHOLDS).shape == (0, 10)
    assert not match_predictions(found, truth[:0], THRESHOLDS).any()


def evaluate_scenes(scenes):
    correct = torch.cat([match_predictions(*pair, THRESHOLDS) for pair in scenes]).numpy()
    found = torch.cat([pair[0] for pair in scenes]).numpy()
    return ap_per_class(correct, found[:, 4], found[:, 5], torch.cat([pair[1][:, 0] for pair in scenes]).numpy())


def test_average_precision_is_close_to_pycocotools(capsys):
    generator = np.random.default_rng(0)
    # Every label is found: where recall ends early, YOLOv5 draws a line down to (1, 0) and pycocotools counts zero.
    scenes = [scene(generator, fewest=2, noise=0.025, sure=0.95) for _ in range(120)]
    ours = evaluate_scenes(scenes)
    sizes = {i: (400, 400) for i in range(len(scenes))}
    truth = COCO()
    truth.dataset = ground_truth(sizes, {i: pair[1].numpy() for i, pair in enumerate(scenes)}, {0: "a", 1: "b", 2: "c"})
    truth.createIndex()
    rows = [row for i, pair in enumerate(scenes) for row in detection_rows(pair[0], i, None)]
    reference = COCOeval(truth, truth.loadRes(rows), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    # pycocotools takes the precision at the next recall, YOLOv5 interpolates: a small difference remains.
    precision = reference.eval["precision"][:, :, :, 0, 2]  # thresholds, recalls, classes
    np.testing.assert_allclose(ours.ap.T[:6], precision.mean(1)[:6], atol=0.006)
    assert 0.5 < ours.means()[2] < 0.97 and ours.means()[2] == pytest.approx(reference.stats[1], abs=0.004)
    capsys.readouterr()
    assert coco_evaluate(truth.dataset, rows, list(sizes)) == pytest.approx(tuple(reference.stats), abs=1e-12)
    assert "Average Precision" in capsys.readouterr().out


def test_operating_point_equals_direct_count():
    generator = np.random.default_rng(1)
    scenes = [scene(generator) for _ in range(60)]
    metrics = evaluate_scenes(scenes)
    correct = torch.cat([match_predictions(*pair, THRESHOLDS) for pair in scenes])[:, 0].numpy()
    found = torch.cat([pair[0] for pair in scenes]).numpy()
    for index, label in enumerate(metrics.classes):
        chosen = (found[:, 5] == label) & (found[:, 4] >= metrics.confidence)
        hits = correct[chosen].sum()
        assert metrics.precision[index] == pytest.approx(hits / chosen.sum(), abs=0.02)
        assert metrics.recall[index] == pytest.approx(hits / metrics.labels[index], abs=0.02)
        assert metrics.true_positives[index] == pytest.approx(hits, abs=2)
        assert metrics.false_positives[index] == pytest.approx(chosen.sum() - hits, abs=3)


def test_class_without_detections_counts_as_zero_and_without_labels_not_at_all():
    correct = np.ones((2, 10), dtype=bool)
    metrics = ap_per_class(correct, np.array([0.9, 0.8]), np.array([0, 7]), np.array([0, 2]))
    assert metrics.classes.tolist() == [0, 2]
    assert metrics.ap50.tolist() == pytest.approx([0.995, 0.0])
    empty = ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0))
    assert empty.means() == (0.0, 0.0, 0.0, 0.0)


def test_confusion_matrix():
    labels = torch.tensor([[0, 0, 0, 10, 10], [1, 20, 20, 30, 30], [1, 50, 50, 60, 60]], dtype=torch.float32)
    found = torch.tensor(
        [
            [0, 0, 10, 10, 0.9, 0],  # right
            [0, 1, 10, 10, 0.8, 0],  # second on the same label: background
            [20, 20, 30, 30, 0.7, 2],  # wrong class
            [80, 80, 90, 90, 0.6, 1],  # nothing there
            [50, 50, 60, 60, 0.2, 1],  # too unsure: the label is missed
        ]
    )
    matrix = ConfusionMatrix(3)
    matrix.add(found, labels)
    expected = np.zeros((4, 4), int)
    expected[0, 0] = expected[0, 3] = expected[2, 1] = expected[1, 3] = expected[3, 1] = 1
    np.testing.assert_array_equal(matrix.matrix, expected)
    matrix.add(found[:0], labels)
    matrix.add(found[:1], labels[:0])
    assert matrix.matrix[3].tolist() == [1, 3, 0, 0] and matrix.matrix[0, 3] == 2


def test_coco_identifiers_and_rows():
    assert image_identifiers(["a/000012.jpg", "b/x.jpg"]) == {"a/000012.jpg": 12, "b/x.jpg": "x"}
    assert image_identifiers(["a/1.jpg", "b/1.jpg"]) == {"a/1.jpg": "a/1.jpg", "b/1.jpg": "b/1.jpg"}
    row = detection_rows(torch.tensor([[1.0, 2.0, 4.0, 8.0, 0.123456, 11]]), 5, COCO_CATEGORY_IDS)[0]
    assert row == {"image_id": 5, "category_id": 13, "bbox": [1, 2, 3, 6], "score": 0.12346}
    assert len(COCO_CATEGORY_IDS) == 80 and COCO_CATEGORY_IDS[-1] == 90


def test_foreign_annotations_are_refused():
    truth = ground_truth({1: (10, 10)}, {1: np.array([[0, 1, 1, 5, 5.0]])}, {0: "a"})
    rows = detection_rows(torch.tensor([[1.0, 1, 5, 5, 0.9, 0]]), 2, None)
    with pytest.raises(UserError, match="does not list"):
        coco_evaluate(truth, rows, [2])


def slow_pairs(found, truth, minimum):
    """IoU and class equality of every pair among detections of at least ``minimum``, by loops in float64."""

    def iou(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0.0) * max(height, 0.0)
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return shared / (areas - shared)

    taken, pairs = set(), []
    for x1, y1, x2, y2, confidence, label in found.double().tolist():
        if confidence < minimum or not len(truth):
            continue
        overlaps = [iou((x1, y1, x2, y2), row[1:]) for row in truth.double().tolist()]
        best = max(range(len(truth)), key=lambda i: overlaps[i])
        if overlaps[best] >= 0.5 and best not in taken:
            taken.add(best)
            pairs.append((overlaps[best], float(truth[best, 0]) == label))
    return pairs


@pytest.mark.parametrize("minimum", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_matched_boxes_equal_loops(seed, minimum):
    generator = np.random.default_rng(seed)
    scenes = [scene(generator, labels=generator.integers(0, 9), sure=0.7) for _ in range(12)]
    for _, truth in scenes:
        if len(truth) > 3:  # labels that overlap each other
            truth[1:3, 1:] = truth[0, 1:] + torch.tensor([[2.0], [4.0]])
    overlap, right_class = (torch.cat(parts) for parts in zip(*(match_boxes(*pair) for pair in scenes), strict=True))
    confidence = torch.cat([found[:, 4] for found, _ in scenes]).numpy()
    number_labels = sum(len(truth) for _, truth in scenes)
    result = matched_boxes(overlap.numpy(), right_class.numpy(), confidence, number_labels, minimum)
    pairs = [pair for found, truth in scenes for pair in slow_pairs(found, truth, minimum)]
    assert result.count == len(pairs) > 5 and result.confidence == minimum
    assert result.share == pytest.approx(len(pairs) / number_labels)
    assert result.mean_iou == pytest.approx(np.mean([pair[0] for pair in pairs]), abs=1e-5)
    assert result.class_accuracy == pytest.approx(np.mean([pair[1] for pair in pairs]))
    assert 0.5 < result.mean_iou < 1 and 0.4 < result.class_accuracy < 1


def test_classification_does_not_touch_localisation():
    truth = torch.tensor([[0, 0, 0, 10, 10], [1, 20, 20, 30, 30]]).float()
    found = torch.tensor([[0, 0, 10, 8, 0.9, 1], [20, 20, 30, 30, 0.5, 1], [0, 0, 10, 10, 0.4, 0]]).float()
    overlap, right_class = match_boxes(found, truth)
    # The third box is the better one, but its label is taken by a more confident one of the wrong class.
    assert overlap.tolist() == pytest.approx([0.8, 1.0, 0.0]) and right_class.tolist() == [False, True, False]
    # At IoU 0.9 the first box claims nothing and the third gets its label.
    assert match_boxes(found, truth, iou_threshold=0.9)[0].tolist() == pytest.approx([0, 1, 1])
    nothing = matched_boxes(np.zeros(3), np.zeros(3, bool), np.ones(3), 2, 0.25)
    assert (nothing.count, nothing.share, nothing.mean_iou, nothing.class_accuracy) == (0, 0, 0, 0)
    for pair in ((found, truth[:0]), (found[:0], truth)):
        assert not match_boxes(*pair)[0].any() and len(match_boxes(*pair)[1]) == len(pair[0])


def test_ap75_is_the_column_of_that_threshold():
    correct = np.zeros((1, 10), dtype=bool)
    for last, expected in ((4, 0.0), (5, 0.995)):  # right up to IoU 0.70, up to 0.75
        correct[0, : last + 1] = True
        metrics = ap_per_class(correct, np.array([0.9]), np.array([0]), np.array([0]))
        assert metrics.ap75.tolist() == pytest.approx([expected])
    assert IOU_THRESHOLDS[5] == pytest.approx(0.75)


def test_average_precision_equals_a_search_for_each_class():
    rng = np.random.default_rng(5)
    number, classes = 400, 6
    correct = np.sort(rng.random((number, 10)) < 0.4, 1)[:, ::-1]
    confidence = rng.integers(0, 50, number) / 50  # many are equal: their order is that of the rows
    predicted, actual = rng.integers(0, classes, number), rng.integers(1, classes + 1, 150)
    table = ap_per_class(correct, confidence, predicted, actual)
    order = np.argsort(-confidence, kind="stable")
    for index, label in enumerate(table.classes):
        mine = order[predicted[order] == label]
        labels = (actual == label).sum()
        for column in range(10):
            hits = correct[mine, column].cumsum()
            expected = compute_ap(hits / (labels + 1e-16), hits / np.arange(1, len(mine) + 1))[0] if len(mine) else 0
            assert table.ap[index, column] == expected
    assert table.classes.tolist() == [1, 2, 3, 4, 5, 6] and table.ap[-1].max() == 0 < table.ap[:-1, 0].min()
