import colorsys

import cv2
import numpy as np
import pytest

from utils import augment as subject


def rectangle_image(shape, box):
    image = np.zeros((*shape, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return image


def extent(mask):
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize(
    "warp",
    [
        {"translate": 0.1, "scale": 0.3},
        {"translate": 0.0, "scale": 0.0, "degrees": 40.0},
        {"translate": 0.05, "scale": 0.2, "shear": 15.0},
        {"translate": 0.05, "scale": 0.1, "degrees": 10.0, "perspective": 0.001},
    ],
)
def test_boxes_follow_the_pixels(warp):
    box = np.array([70, 80, 130, 110])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = np.array([[3, *box]], np.float32)
        image, moved = subject.random_perspective(rectangle_image((200, 220), box), labels, rng, (180, 240), **warp)
        assert image.shape == (180, 240, 3)
        seen = extent((image[..., 0] > 127) & (image[..., 0] != 114))
        assert moved[0, 0] == 3
        np.testing.assert_allclose(moved[0, 1:], seen, atol=1.6)


def test_an_identity_leaves_the_image_alone():
    image = rectangle_image((32, 32), (4, 4, 8, 8))
    labels = np.array([[0, 4, 4, 8, 8]], np.float32)
    found, moved = subject.random_perspective(image, labels, np.random.default_rng(0), translate=0, scale=0)
    assert found is image
    assert moved is labels


def test_kept_boxes_equal_a_loop_over_the_rules():
    rng = np.random.default_rng(1)
    before = np.concatenate([start := rng.uniform(0, 80, (300, 2)), start + rng.uniform(0.5, 60, (300, 2))], 1)
    after = before.clip(20, 70)
    after[:5] = [0, 0, 300, 2.5]
    expected = []
    for (a, b, c, d), (e, f, g, h) in zip(before, after, strict=True):
        width, height = g - e, h - f
        share = width * height / ((c - a) * (d - b))
        thin = max(width, height) / max(min(width, height), 1e-9)
        expected.append(width > 2 and height > 2 and share > 0.1 and thin < 100)
    assert subject.keep_boxes(before, after).tolist() == expected
    assert 0 < sum(expected) < 300


def test_a_box_that_leaves_the_image_is_dropped():
    labels = np.array([[0, 2, 2, 12, 12], [1, 90, 90, 110, 110]], np.float32)
    image = np.zeros((200, 200, 3), np.uint8)
    _, kept = subject.random_perspective(image, labels, np.random.default_rng(0), (100, 100), translate=0, scale=0)
    assert kept[:, 0].tolist() == [1]  # the centre hundred pixels are kept
    np.testing.assert_allclose(kept[0, 1:], [40, 40, 60, 60])


def test_mosaic_puts_every_tile_and_its_boxes_where_they_belong():
    size, colours = 64, (10, 60, 160, 250)
    shapes = [(64, 40), (30, 64), (64, 64), (50, 64)]
    corners = set()
    for seed in range(20):
        tiles = [np.full((*shape, 3), colour, np.uint8) for shape, colour in zip(shapes, colours, strict=True)]
        whole = np.array([[0, 0.5, 0.5, 1, 1]], np.float32)
        rows = [whole + np.eye(1, 5, dtype=np.float32) * number for number in range(4)]
        canvas, labels = subject.mosaic(tiles, rows, size, np.random.default_rng(seed))
        assert canvas.shape == (128, 128, 3)
        for number, colour in enumerate(colours):
            np.testing.assert_array_equal(labels[number, 1:], extent(canvas[..., 0] == colour))
        assert labels[0, 3] == labels[1, 1] == labels[2, 3] == labels[3, 1]  # they meet in one point
        assert labels[0, 4] == labels[1, 4] == labels[2, 2] == labels[3, 2]
        assert 32 <= labels[0, 3] <= 96
        corners.add(tuple(labels[0, 3:]))
    assert len(corners) == 20


def test_flips_mirror_image_and_boxes():
    image = rectangle_image((40, 60), (5, 7, 20, 11))
    labels = np.array([[2, 5, 7, 20, 11]], np.float32)
    for up_down, left_right in ((0, 0), (1, 0), (0, 1), (1, 1)):
        flipped, moved = subject.flip(image, labels, np.random.default_rng(0), up_down, left_right)
        expected = image[:: -1 if up_down else 1, :: -1 if left_right else 1]
        np.testing.assert_array_equal(flipped, expected)
        np.testing.assert_array_equal(moved[0, 1:], extent(flipped[..., 0]))
        assert moved.dtype == np.float32
    chance = [subject.flip(image, labels, np.random.default_rng(s), 0, 0.5)[1][0, 1] != 5 for s in range(200)]
    assert 70 < sum(chance) < 130


def test_hsv_equals_a_conversion_pixel_by_pixel():
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    gains = 1 + np.random.default_rng(5).uniform(-1, 1, 3) * (0.015, 0.7, 0.4)
    found = subject.shift_hsv(image, np.random.default_rng(5), 0.015, 0.7, 0.4)
    expected = np.empty_like(image)
    for place in np.ndindex(12, 12):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place][::-1] / 255))
        shifted = (hue * gains[0]) % 1, min(saturation * gains[1], 1), min(value * gains[2], 1)
        expected[place] = np.array(colorsys.hsv_to_rgb(*shifted))[::-1] * 255
    assert np.abs(found.astype(int) - expected).max() <= 8  # hue has 180 steps, the tables are of whole numbers
    assert np.abs(found.astype(int) - expected).mean() < 2


def test_grey_stays_grey_and_no_gain_changes_nothing():
    grey = cv2.cvtColor(np.arange(256, dtype=np.uint8).reshape(16, 16), cv2.COLOR_GRAY2BGR)
    shifted = subject.shift_hsv(grey, np.random.default_rng(0), 0.5, 0.9, 0.5)
    assert (shifted != grey).any()
    assert (np.ptp(shifted, axis=-1) == 0).all()
    assert subject.shift_hsv(grey, np.random.default_rng(0), 0, 0, 0) is grey


def test_mixup_is_a_weighted_mean_with_both_labels():
    first, second = np.full((8, 8, 3), 200, np.uint8), np.full((8, 8, 3), 100, np.uint8)
    one, two = np.zeros((1, 5), np.float32), np.ones((2, 5), np.float32)
    values = []
    for seed in range(50):
        mixed, labels = subject.mixup(first, one, second, two, np.random.default_rng(seed))
        np.testing.assert_array_equal(labels, np.concatenate([one, two]))
        share = np.random.default_rng(seed).beta(32, 32)
        assert abs(int(mixed[0, 0, 0]) - (200 * share + 100 * (1 - share))) <= 0.5
        values.append(mixed[0, 0, 0])
    assert np.std(values) == pytest.approx(100 * 0.062, rel=0.5)  # Beta(32, 32) has a deviation of 0.062
