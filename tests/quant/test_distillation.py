"""The distillation terms against loops written out in float64, and that only the student learns."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from quant.ada import freeze_teacher
from quant.distillation import bernoulli_kl, box_overlap, channel_wise, distillation_losses, feature_mse, head_logits

TERMS = ["feature_mse", "channel_wise", "logits", "boxes"]


def pair(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*shape), torch.randn(*shape) * 1.5 + 0.3


def test_feature_mse_is_noise_over_signal():
    student, teacher = pair(2, 3, 4, 5)
    noise = signal = 0.0
    for channel in range(3):
        values = teacher[:, channel].double().flatten()
        noise += sum(float(v) ** 2 for v in student[:, channel].double().flatten() - values)
        signal += sum(float(v) ** 2 for v in values)
    assert feature_mse(student, teacher).item() == pytest.approx(noise / signal, rel=1e-5)


def test_feature_mse_does_not_depend_on_the_scale_and_survives_a_constant_feature():
    student, teacher = pair(2, 3, 4, 5)
    assert feature_mse(student * 100, teacher * 100).item() == pytest.approx(feature_mse(student, teacher).item())
    constant = torch.full_like(teacher, 0.7)
    assert feature_mse(constant * 1.1, constant).item() == pytest.approx(0.01, rel=1e-4)
    assert math.isfinite(feature_mse(student, torch.zeros_like(teacher)).item())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_wise_is_the_kl_of_softmax_maps_times_the_squared_temperature(temperature):
    student, teacher = pair(2, 3, 3, 4)
    total = 0.0
    for sample in range(2):
        for channel in range(3):
            maps = []
            for x in (teacher, student):
                weights = [math.exp(float(v) / temperature) for v in x[sample, channel].double().flatten()]
                maps.append([w / sum(weights) for w in weights])
            total += sum(p * math.log(p / q) for p, q in zip(*maps, strict=True))
    expected = total / 6 * temperature**2
    assert channel_wise(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_bernoulli_kl_equals_torch_distributions():
    student, teacher = pair(50)
    first, second = (torch.distributions.Bernoulli(logits=x.double()) for x in (teacher, student))
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(bernoulli_kl(teacher, student).double(), expected, rtol=1e-4, atol=1e-6)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def binary_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_head_logits_are_weighted_by_the_teachers_objectness():
    students, teachers = [], []
    for level, size in enumerate((3, 2)):
        student, teacher = pair(2, 2, size, size, 8, seed=level)
        students.append(student)
        teachers.append(teacher)
    total = objects = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        for ours, theirs in zip(student.reshape(-1, 8).tolist(), teacher.reshape(-1, 8).tolist(), strict=True):
            o = sigmoid(theirs[4])
            boxes = sum((sigmoid(a) - sigmoid(b)) ** 2 for a, b in zip(ours[:4], theirs[:4], strict=True))
            classes = sum(binary_kl(sigmoid(b), sigmoid(a)) for a, b in zip(ours[5:], theirs[5:], strict=True))
            total += binary_kl(o, sigmoid(ours[4])) + o * (boxes + classes)
            objects += o
    assert head_logits(students, teachers).item() == pytest.approx(total / objects, rel=1e-4)


def ciou(first, second):
    """Of two boxes (x, y, width, height), equations 8 to 11 of arXiv 1911.08287."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = first, second
    width = max(min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2), 0)
    height = max(min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2), 0)
    iou = width * height / (aw * ah + bw * bh - width * height)
    hull_width = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    hull_height = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    distance = ((ax - bx) ** 2 + (ay - by) ** 2) / (hull_width**2 + hull_height**2)
    aspect = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    return iou - distance - aspect**2 / (1 - iou + aspect)


def test_boxes_are_compared_by_ciou_and_weighted_by_the_teachers_objectness():
    own = torch.tensor([[[1.5, 2.0], [4.0, 3.0]], [[2.5, 5.0], [6.0, 1.0]]])  # (levels, anchors, 2)
    anchors = own, own.flip(1) * 1.25
    students, teachers = zip(*(pair(2, 2, size, size, 8, seed=level) for level, size in enumerate((3, 2))), strict=True)
    total = objects = 0.0
    for student, teacher, *sizes in zip(students, teachers, *(a.tolist() for a in anchors), strict=True):
        for image, anchor, row, column in itertools.product(*(range(n) for n in student.shape[:4])):
            boxes = []
            for raw, size in ((student, sizes[0][anchor]), (teacher, sizes[1][anchor])):
                x, y, w, h, o = (sigmoid(v) for v in raw[image, anchor, row, column, :5].tolist())
                boxes.append((column + 2 * x - 0.5, row + 2 * y - 0.5, (2 * w) ** 2 * size[0], (2 * h) ** 2 * size[1]))
            total += o * (1 - ciou(*boxes))  # o: the teacher's, which comes last
            objects += o
    assert box_overlap(students, teachers, anchors).item() == pytest.approx(total / objects, rel=1e-4)


def test_a_picture_without_objects_is_not_divided_by_zero():
    student, teacher = pair(1, 3, 4, 4, 8)
    teacher[..., 4] = -40.0
    student[..., 4] = -30.0
    assert head_logits([student], [teacher]).item() < 1e-3


def arguments(student, teacher):
    raw = [x[:, :, None].transpose(1, 4) for x in (student, teacher)]  # (B, H, 1, W, C): any five numbers and classes
    return {5: student}, {5: teacher}, [raw[0]], [raw[1]], 1.0, (torch.ones(1, raw[0].shape[1], 2),) * 2


@pytest.mark.parametrize("term", TERMS)
def test_equal_networks_cost_nothing(term):
    x = torch.randn(2, 8, 5, 5)
    loss = distillation_losses([term], *arguments(x, x.clone()))[term]
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("term", TERMS)
def test_loss_trains_the_student_and_never_the_teacher(term):
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(3, 8, 3), freeze_teacher(nn.Conv2d(3, 8, 3))
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.2)
    images, losses = torch.randn(2, 3, 10, 10), []
    for _ in range(30):
        features = teacher(images).requires_grad_(True)  # even if the teacher's output asked for a gradient
        loss = distillation_losses([term], *arguments(student(images), features))[term]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert features.grad is None
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("term", TERMS)
def test_half_precision_features_are_compared_in_float32(term):
    student, teacher = (x.half() for x in pair(2, 8, 40, 40))
    half = distillation_losses([term], *arguments(student, teacher))[term]
    full = distillation_losses([term], *arguments(student.float(), teacher.float()))[term]
    assert half.dtype is torch.float32 and half.item() == pytest.approx(full.item(), rel=1e-4)


def test_terms_come_together_and_unknown_ones_are_refused():
    student, teacher = pair(2, 8, 5, 5)
    together = distillation_losses(TERMS, *arguments(student, teacher))
    assert list(together) == TERMS
    for term in TERMS:
        alone = distillation_losses([term], *arguments(student, teacher))
        assert alone == {term: together[term]}
    with pytest.raises(ValueError, match="'ada' is not"):
        distillation_losses(["ada"], *arguments(student, teacher))
