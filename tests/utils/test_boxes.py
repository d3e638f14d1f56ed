import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

from utils import boxes as subject
from utils.images import letterbox


@pytest.fixture(params=["numpy", "torch"])
def corners(request):
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0, 300, (2, 50, 2))
    array = np.concatenate([np.minimum(first, second), np.maximum(first, second)], 1)
    return array if request.param == "numpy" else torch.from_numpy(array)


def as_tensor(values):
    return torch.as_tensor(np.asarray(values))


@pytest.mark.parametrize("name, target", [("xyxy_to_xywh", "cxcywh"), ("xyxy_to_ltwh", "xywh")])
def test_formats_equal_torchvision(corners, name, target):
    result = getattr(subject, name)(corners)
    assert type(result) is type(corners)
    torch.testing.assert_close(as_tensor(result), box_convert(as_tensor(corners), "xyxy", target))


def test_there_and_back_without_touching_the_input(corners):
    before = corners.copy() if isinstance(corners, np.ndarray) else corners.clone()
    for there, back in (
        (subject.xyxy_to_xywh, subject.xywh_to_xyxy),
        (lambda b: subject.xyxy_to_xywhn(b, 400, 350), lambda b: subject.xywhn_to_xyxy(b, 400, 350)),
    ):
        torch.testing.assert_close(as_tensor(back(there(corners))), as_tensor(before))
    subject.clip_boxes(corners, (10, 10))
    subject.scale_boxes((64, 64), corners, (10, 10))
    torch.testing.assert_close(as_tensor(corners), as_tensor(before))


def test_normalising_with_a_clip_equals_the_golden_value(corners):
    kind = np.array if isinstance(corners, np.ndarray) else torch.tensor
    result = subject.xyxy_to_xywhn(kind([[-5.0, 10.0, 700.0, 300.0]]), 640, 480, clip=True, margin=1e-3)
    np.testing.assert_allclose(result, [[0.499999, 0.322917, 0.999998, 0.604167]], atol=5e-7)


def test_padding_moves_normalised_boxes(corners):
    normalised = subject.xyxy_to_xywhn(corners, 400, 350)
    moved = subject.xywhn_to_xyxy(normalised, 800, 700, 7, 5)
    np.testing.assert_allclose(as_tensor(moved), as_tensor(corners) * 2 + torch.tensor([7, 5, 7, 5]))


@pytest.mark.parametrize("shape", [(1080, 810), (720, 1280), (375, 500)])
def test_scale_boxes_undoes_a_letterbox(corners, shape):
    padded, (ratio, _), (pad_width, pad_height) = letterbox(np.zeros((*shape, 3), np.uint8), auto=False)
    inside = subject.clip_boxes(corners, shape)
    there = inside * ratio
    there = there + (np.array if isinstance(corners, np.ndarray) else torch.tensor)([pad_width, pad_height] * 2)
    explicit = subject.scale_boxes(padded.shape, there, shape, ((ratio, ratio), (pad_width, pad_height)))
    np.testing.assert_allclose(explicit, inside, atol=1e-9)
    np.testing.assert_allclose(subject.scale_boxes(padded.shape, there, shape), inside, atol=1e-9)


def test_boxes_are_clipped_to_height_and_width(corners):
    clipped = np.asarray(subject.clip_boxes(corners - 50, (100, 200)))
    assert clipped.min() == 0
    assert clipped[:, [0, 2]].max() == 200
    assert clipped[:, [1, 3]].max() == 100


def test_rows_of_each_image_equal_a_search_for_them():
    rows = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    for index in (torch.arange(40) // 12, torch.arange(40) % 5 * 2):
        rows[:, 0] = index
        split = subject.split_by_image(rows, 9)
        assert len(split) == 9
        for image, mine in enumerate(split):
            assert torch.equal(mine, rows[rows[:, 0] == image, 1:])
    assert [len(part) for part in subject.split_by_image(rows[:0], 3)] == [0, 0, 0]
