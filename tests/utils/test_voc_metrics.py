from fractions import Fraction

import numpy as np
import pytest
import torch

from utils.difficult import difficult_path
from utils.voc_metrics import VocEvaluator, average_precision

CLASSES = 3


def scene(generator, objects=6, guesses=14):
    """Detections, labels, difficult objects of one image, at whole pixels and tenths of confidence: many overlaps are
    exactly 0.5, and many confidences are equal."""
    count = int(generator.integers(0, objects))
    low, size = generator.integers(0, 12, (count, 2)), generator.integers(2, 8, (count, 2))
    truth = np.concatenate([generator.integers(0, CLASSES, (count, 1)), low, low + size], 1)
    found = []
    for _ in range(int(generator.integers(0, guesses))):
        if count and generator.random() < 0.8:
            label, *box = truth[generator.integers(count)].tolist()
            box = np.array(box) + generator.integers(-1, 2, 4) * (generator.random() < 0.7)
        else:
            label, box = 0, np.array([0, 0, 3, 3]) + np.tile(generator.integers(0, 12, 2), 2)
        label = label if generator.random() < 0.85 else generator.integers(CLASSES)
        found.append([*box, round(generator.random(), 1), label])
    hard = generator.random(count) < 0.3
    return np.array(found, float).reshape(-1, 6), truth[~hard].astype(float), truth[hard].astype(float)


def overlap(a, b) -> Fraction:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return Fraction(0)
    both = Fraction(width) * Fraction(height)
    area_a, area_b = ((Fraction(c[2]) - Fraction(c[0])) * (Fraction(c[3]) - Fraction(c[1])) for c in (a, b))
    return both / (area_a + area_b - both)


def reference(scenes, label):
    """VOC's evaluation of one class as its development kit describes it, in plain loops and whole fractions."""
    detections = [
        (row, image) for image, (found, _, _) in enumerate(scenes) for row in found.tolist() if row[5] == label
    ]
    detections.sort(key=lambda pair: -pair[0][4])  # Python's sort keeps the order of equals
    objects = {}
    for image, (_, easy, difficult) in enumerate(scenes):
        pairs = [(row, False) for row in easy.tolist()] + [(row, True) for row in difficult.tolist()]
        objects[image] = [(row[1:], hard) for row, hard in pairs if row[0] == label]
    number = sum(not hard for rows in objects.values() for _, hard in rows)
    if not number:
        return None
    used, curve, true, false = set(), [], 0, 0
    for row, image in detections:
        best, chosen = Fraction(-1), None
        for index, (box, _) in enumerate(objects[image]):
            if overlap(row, box) > best:
                best, chosen = overlap(row, box), index
        if best >= Fraction(1, 2):
            if objects[image][chosen][1]:
                continue
            if (image, chosen) in used:
                false += 1
            else:
                used.add((image, chosen))
                true += 1
        else:
            false += 1
        curve.append((Fraction(true, number), Fraction(true, true + false)))
    eleven = sum(
        max((precision for recall, precision in curve if recall >= Fraction(tenth, 10)), default=Fraction(0))
        for tenth in range(11)
    )
    area, before = Fraction(0), Fraction(0)
    for position, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[position:])
        before = recall
    return float(eleven / 11), float(area)


def measured(scenes):
    evaluator = VocEvaluator()
    for parts in scenes:
        evaluator.add(*(torch.from_numpy(part) for part in parts))
    return evaluator.finish()


def test_scores_equal_those_of_plain_loops_on_random_cases():
    generator = np.random.default_rng(0)
    seen, ignored = [], 0
    for _ in range(60):
        scenes = [scene(generator) for _ in range(int(generator.integers(1, 6)))]
        result = measured(scenes)
        expected = {label: pair for label in range(CLASSES) if (pair := reference(scenes, label))}
        assert result.classes.tolist() == list(expected)
        np.testing.assert_allclose(
            np.stack([result.ap11, result.ap], 1), np.array([*expected.values()]).reshape(-1, 2), rtol=0, atol=1e-12
        )
        seen.extend(expected.values())
        ignored += result.ignored
    values = np.array(seen)
    assert len(values) > 100 and ignored > 50 and values.std(0).min() > 0.15  # the cases are no trivial ones


def rows(*items):
    return torch.tensor(items, dtype=torch.float64).reshape(len(items), -1)


def test_difficult_objects_are_neither_found_nor_missed_nor_mistaken():
    easy, hard = rows([0, 0, 0, 10, 10]), rows([0, 20, 20, 30, 30])
    nothing = torch.zeros(0, 5)
    on_easy, on_hard, again = [0, 0, 10, 10, 0.5, 0], [20, 20, 30, 30, 0.9, 0], [20, 20, 30, 29, 0.8, 0]

    def score(found, labels, difficult):
        evaluator = VocEvaluator()
        evaluator.add(found, labels, difficult)
        return evaluator.finish()

    both = score(rows(on_easy, on_hard, again), easy, hard)
    assert (both.map, both.map11, both.ignored, both.difficult) == (1.0, 1.0, 2, 1)
    without = score(rows(on_easy, on_hard, again), easy, nothing)
    assert without.map == pytest.approx(1 / 3) and without.ignored == 0
    as_others = score(rows(on_easy, on_hard, again), torch.cat((easy, hard)), nothing)
    assert as_others.map == pytest.approx((1 + 2 / 3) / 2)  # the second detection of an object is wrong
    assert score(rows(on_easy), easy, hard).map == 1.0
    # A class with difficult objects only is not scored.
    assert len(score(rows(on_hard), nothing, hard).classes) == 0
    # A difficult object of another class excuses nothing.
    assert score(rows(on_easy, on_hard), easy, rows([1, 20, 20, 30, 30])).map == 0.5


def test_both_averages_of_a_known_curve():
    # Two of four objects: precision 1 up to recall 1/4, then 2/3 up to 1/2.
    eleven, every = average_precision(np.array([True, False, True]), 4)
    assert eleven == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)  # recalls 0, .1, .2 and .3, .4, .5
    assert every == pytest.approx(1 / 4 + 1 / 4 * 2 / 3)
    # A recall of 3/10 reaches the point 0.3, which binary fractions deny: 3 * 0.1 > 0.3.
    assert average_precision(np.array([True] * 3), 10)[0] == pytest.approx(4 / 11)
    assert average_precision(np.zeros(0, bool), 3) == (0.0, 0.0)


def test_nothing_to_measure():
    result = VocEvaluator().finish()
    assert (result.map, result.map11) == (0.0, 0.0)
    assert measured([(np.zeros((0, 6)), np.zeros((0, 5)), np.zeros((0, 5)))]).map == 0.0
    assert "0.0000" in result.lines({}, True)[0]


def test_difficult_objects_come_from_their_files_and_classes_can_be_one(tmp_path):
    image = tmp_path / "images" / "a.jpg"
    difficult_path(image).parent.mkdir()
    difficult_path(image).write_text("2 .25 .75 .1 .2\n")
    found = rows([20, 65, 30, 85, 0.9, 2], [0, 0, 10, 10, 0.8, 1])
    labels = rows([1, 0, 0, 10, 10])
    evaluator = VocEvaluator()
    evaluator.add_file(image, (100, 100), found, labels)
    assert (evaluator.finish().map, evaluator.finish().ignored) == (1.0, 1)
    single = VocEvaluator(single_class=True)
    found[:, 5], labels[:, 0] = 0, 0
    single.add_file(image, (100, 100), found, labels)
    assert (single.finish().map, single.finish().ignored) == (1.0, 1)


def test_the_table_has_a_line_per_class():
    found = rows([0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.9, 1])
    labels = rows([0, 0, 0, 10, 10], [1, 0, 0, 10, 10])
    evaluator = VocEvaluator()
    evaluator.add(found, labels, torch.zeros(0, 5))
    lines = evaluator.finish().lines({0: "cat", 1: "dog"}, verbose=True)
    assert lines[0].startswith("VOC, IoU 0.5: mAP by 11 points 0.5000, by every point 0.5000")
    assert [line.split() for line in lines[1:]] == [
        ["Class", "Objects", "AP11", "AP"], ["cat", "1", "1.0000", "1.0000"], ["dog", "1", "0.0000", "0.0000"]
    ]  # fmt: skip
