import subprocess
import sys

import pytest
import torch
import torchvision

from utils.nms import CLASS_OFFSET, non_max_suppression
from utils.paths import ROOT


def random_prediction(images=2, rows=120, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(images, rows, 2, generator=generator) * 200
    size = torch.rand(images, rows, 2, generator=generator) * 80 + 5
    return torch.cat((centre, size, torch.rand(images, rows, 1 + classes, generator=generator)), 2)


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow(rows, confidence, iou, classes=None, agnostic=False, multi_label=False, limit=300):
    """One image by plain loops."""
    found = []
    for x, y, w, h, objectness, *scores in rows.tolist():
        if objectness <= confidence:
            continue
        products = [(objectness * score, label) for label, score in enumerate(scores)]
        for score, label in products if multi_label else [max(products, key=lambda p: p[0])]:
            if score > confidence and (classes is None or label in classes):
                found.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2, score, label))
    kept = []
    for box in sorted(found, key=lambda b: -b[4]):
        if all(overlap(box, other) <= iou or (not agnostic and box[5] != other[5]) for other in kept):
            kept.append(box)
    return kept[:limit]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"multi_label": True},
        {"agnostic": True},
        {"classes": [0, 2]},
        {"multi_label": True, "agnostic": True, "classes": [1]},
    ],
)
@pytest.mark.parametrize(("confidence", "iou"), [(0.25, 0.45), (0.05, 0.6)])
def test_equals_plain_loops(options, confidence, iou):
    prediction = random_prediction()
    results = non_max_suppression(prediction, confidence, iou, **options)
    assert len(results) == 2
    for rows, found in zip(prediction, results, strict=True):
        expected = torch.tensor(slow(rows, confidence, iou, **options))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


def test_maximum_is_kept_and_sorted():
    found = non_max_suppression(random_prediction(), 0.05, 0.9, max_detections=7)
    assert all(len(rows) == 7 and (rows[:-1, 4] >= rows[1:, 4]).all() for rows in found)


def test_classes_far_apart_keep_exact_boxes():
    # With offsets added in float32 these two boxes of class 79 would be rounded and measured as overlapping more.
    rows = torch.zeros(1, 2, 85)
    rows[0, :, :5] = torch.tensor([[100.03, 100.03, 4.02, 4.02, 1], [101.04, 100.03, 4.02, 4.02, 0.9]])
    rows[0, :, 84] = 1
    exact = overlap((98.02, 98.02, 102.04, 102.04), (99.03, 98.02, 103.05, 102.04))
    assert len(non_max_suppression(rows, 0.1, exact - 0.001)[0]) == 1
    assert len(non_max_suppression(rows, 0.1, exact + 0.001)[0]) == 2


def test_nothing_found_and_one_class():
    empty = non_max_suppression(torch.zeros(2, 10, 6), 0.25)
    assert [tuple(rows.shape) for rows in empty] == [(0, 6), (0, 6)]
    one = random_prediction(1, classes=1)
    expected = torch.tensor(slow(one[0], 0.25, 0.45))
    torch.testing.assert_close(non_max_suppression(one, multi_label=True)[0], expected, atol=1e-3, rtol=1e-5)


def test_labels_take_part_with_full_confidence():
    labels = [torch.tensor([[3, 50.0, 60.0, 20.0, 10.0]]), torch.zeros(0, 5)]
    found = non_max_suppression(random_prediction(), 0.25, 0.45, labels=labels)
    assert found[0][0].tolist() == pytest.approx([40, 55, 60, 65, 1, 3])
    assert found[1][0, 4] < 1


@pytest.mark.parametrize("options", [{"confidence_threshold": 1.5}, {"iou_threshold": -0.1}])
def test_thresholds_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        non_max_suppression(random_prediction(), **options)


@pytest.mark.parametrize("rows", [30, 400])
def test_looking_at_the_best_boxes_first_changes_nothing(rows):
    # Nearly all boxes overlap, so the first look at twice as many as may be returned keeps too few.
    prediction = random_prediction(1, rows, classes=3, seed=4)
    prediction[..., :2] = prediction[..., :2] / 20 + 100
    for limit in (1, 5, 20):
        found = non_max_suppression(prediction, 0.05, 0.5, multi_label=True, max_detections=limit)[0]
        everything = non_max_suppression(prediction, 0.05, 1.0, multi_label=True, max_detections=10**6)[0]
        boxes = everything[:, :4].double() + everything[:, 5:6].double() * CLASS_OFFSET
        kept = torchvision.ops.nms(boxes, everything[:, 4].double(), 0.5)
        assert torch.equal(found, everything[kept[:limit]])
        assert len(kept) > 5


def test_rows_may_come_already_chosen():
    prediction = random_prediction()
    chosen = [rows[rows[:, 4] > 0.25] for rows in prediction]
    assert len(chosen[0]) != len(chosen[1])
    for options in ({}, {"multi_label": True}, {"classes": [1]}):
        whole, parts = (non_max_suppression(given, 0.25, **options) for given in (prediction, chosen))
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_suppression_needs_no_package_that_takes_seconds_to_import():
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from utils.nms import non_max_suppression\n"
        "rows = torch.tensor([[[50.0, 50, 20, 20, 0.9, 1], [51, 50, 20, 20, 0.8, 1], [90, 50, 20, 20, 0.7, 1]]])\n"
        "found = non_max_suppression(rows)[0]\n"
        "assert found[:, 4].tolist() == rows[0, ::2, 4].tolist()\n"
        "assert 'torchvision' not in sys.modules\n"
        "import torchvision\n"
        "assert len(torchvision.ops.nms(found[:, :4].double(), found[:, 4].double(), 0.5)) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
