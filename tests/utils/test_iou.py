import math

import pytest
import torch
import torchvision

from utils.iou import bbox_iou, box_iou

FIRST = torch.tensor([[10, 10, 4, 6], [0.5, 0.5, 2, 2], [5, 5, 1, 9]])
SECOND = torch.tensor([[11, 9, 5, 5], [0.75, 0.25, 2, 1], [5, 5, 9, 1]])
GOLDEN = {
    "iou": [0.473684, 0.411765, 0.058824],
    "giou": [0.403754, 0.356209, -0.7313],
    "diou": [0.446098, 0.397972, 0.058824],
    "ciou": [0.445638, 0.395178, -0.265573],
}


def random_corners(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(number, 2, generator=generator) * 50
    return torch.cat((start, start + torch.rand(number, 2, generator=generator) * 30 + 0.1), 1)


@pytest.mark.parametrize("kind", GOLDEN)
def test_known_values(kind):
    assert bbox_iou(FIRST, SECOND, kind).tolist() == pytest.approx(GOLDEN[kind], abs=2e-6)


def test_all_pairs_equal_torchvision():
    first, second = random_corners(40), random_corners(30, 1)
    torch.testing.assert_close(box_iou(first, second), torchvision.ops.box_iou(first, second), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("giou", torchvision.ops.generalized_box_iou_loss),
        ("diou", torchvision.ops.distance_box_iou_loss),
        ("ciou", torchvision.ops.complete_box_iou_loss),
    ],
)
def test_value_and_gradient_equal_torchvision(kind, reference):
    second = random_corners(50, 1).double()
    results = []
    for compute in (
        lambda a: 1 - bbox_iou(a, second, kind, xywh=False, eps=1e-9),
        lambda a: reference(a, second, eps=1e-9),
    ):
        first = random_corners(50).double().requires_grad_()
        loss = compute(first)
        loss.sum().backward()
        results.append((loss.detach(), first.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_empty_boxes_stay_finite():
    zero = torch.zeros(1, 4, requires_grad=True)
    for kind in GOLDEN:
        value = bbox_iou(zero, zero, kind)
        value.sum().backward()
        assert math.isfinite(value.item()) and torch.isfinite(zero.grad).all()
    assert box_iou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="siou"):
        bbox_iou(FIRST, SECOND, "siou")
