import colorsys

import cv2
import numpy as np
import pytest

from utils import augment as subject
from utils.canvas import Canvas, Tile


def rectangle_image(shape, box):
    image = np.zeros((*shape, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return image


def tile(image):
    return Tile(lambda: image, image.shape[1], image.shape[0])


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
        image, moved = subject.random_perspective(
            Canvas.of(rectangle_image((200, 220), box)), labels, rng, (180, 240), **warp
        )
        assert image.shape == (180, 240, 3)
        seen = extent((image[..., 0] > 127) & (image[..., 0] != 114))
        assert moved[0, 0] == 3
        np.testing.assert_allclose(moved[0, 1:], seen, atol=1.1)


def test_an_identity_leaves_the_image_alone():
    image = rectangle_image((32, 32), (4, 4, 8, 8))
    labels = np.array([[0, 4, 4, 8, 8]], np.float32)
    found, moved = subject.random_perspective(Canvas.of(image), labels, np.random.default_rng(0), translate=0, scale=0)
    assert np.shares_memory(found, image)
    assert found.shape == image.shape
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


def bilinear(image, matrix, to_shape):
    """What each pixel's centre sees through a map of coordinates, grey outside; NumPy, float64."""
    height, width = to_shape
    y, x = np.mgrid[:height, :width] + 0.5
    points = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(matrix).T
    x, y = (points[..., axis] / points[..., 2] - 0.5 for axis in (0, 1))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=114).astype(float)
    x, y = (values.clip(-1, side) + 1 for values, side in ((x, image.shape[1]), (y, image.shape[0])))
    left, top = np.minimum(x.astype(int), image.shape[1]), np.minimum(y.astype(int), image.shape[0])
    across, down = (x - left)[..., None], (y - top)[..., None]
    upper = padded[top, left] * (1 - across) + padded[top, left + 1] * across
    lower = padded[top + 1, left] * (1 - across) + padded[top + 1, left + 1] * across
    return upper * (1 - down) + lower * down


@pytest.fixture(scope="module")
def smooth_image():
    """Noise without the finest detail: 90 x 120."""
    return cv2.GaussianBlur(np.random.default_rng(7).integers(0, 256, (90, 120, 3), np.uint8), (0, 0), 1.0)


def test_scaling_and_moving_equal_bilinear_sampling(smooth_image):
    """All but the outermost pixels, where the edge of what is seen repeats instead of what lies beyond it."""
    scales = []
    for seed in range(40):
        drawn, factor = subject.draw_perspective_matrix(np.random.default_rng(seed), (90, 120), (60, 100))
        found, moved = subject.random_perspective(
            Canvas.of(smooth_image), np.array([[0, 30, 20, 90, 70]], np.float32), np.random.default_rng(seed), (60, 100)
        )
        left, top, width, height = subject.visible_rectangle(drawn, (60, 100))
        assert abs(left + drawn[0, 2] / factor) <= 0.5 >= abs(width - 100 / factor)
        assert abs(top + drawn[1, 2] / factor) <= 0.5 >= abs(height - 60 / factor)
        across, down = 100 / width, 60 / height
        matrix = np.array([[across, 0, -left * across], [0, down, -top * down], [0, 0, 1]])
        difference = np.abs(found - bilinear(smooth_image, matrix, (60, 100)))[1:-1, 1:-1]
        assert difference.max() <= 1
        corners = np.array([[30, 20], [90, 70]]) * (across, down) - (left * across, top * down)
        np.testing.assert_allclose(moved[0, 1:], corners.clip(0, (100, 60)).ravel(), atol=1e-4)
        scales.append(factor)
    assert min(scales) < 0.6 and max(scales) > 1.4


@pytest.mark.parametrize("warp", [{"degrees": 30.0}, {"shear": 10.0}, {"degrees": 10.0, "perspective": 0.002}])
def test_warping_what_is_seen_equals_warping_everything(smooth_image, warp):
    for seed in range(20):
        matrix, _ = subject.draw_perspective_matrix(np.random.default_rng(seed), (90, 120), (60, 100), **warp)
        found, _ = subject.random_perspective(
            Canvas.of(smooth_image), np.zeros((0, 5), np.float32), np.random.default_rng(seed), (60, 100), **warp
        )
        difference = np.abs(found - bilinear(smooth_image, matrix, (60, 100)))
        # Releases of OpenCV before 5 round positions to a 32nd of a pixel.
        assert difference.max() <= 4
        assert difference.mean() < 0.6


def test_a_very_small_scale_draws_no_more_than_a_few_canvases(smooth_image):
    drawn = []

    class Watched(Canvas):
        def draw(self, left, top, width, height):
            drawn.append(width * height / (self.width * self.height))
            return super().draw(left, top, width, height)

    canvas = Watched(Canvas.of(smooth_image).tiles, 120, 90)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        subject.random_perspective(canvas, np.zeros((0, 5), np.float32), rng, scale=1.0, translate=0)
    assert len(drawn) == 200
    assert 4 < max(drawn) <= 16.2  # 1 / SMALLEST_RESIZE squared, in whole pixels


def test_a_box_that_leaves_the_image_is_dropped():
    labels = np.array([[0, 2, 2, 12, 12], [1, 90, 90, 110, 110]], np.float32)
    canvas = Canvas.of(np.zeros((200, 200, 3), np.uint8))
    _, kept = subject.random_perspective(canvas, labels, np.random.default_rng(0), (100, 100), translate=0, scale=0)
    assert kept[:, 0].tolist() == [1]  # the centre hundred pixels are kept
    np.testing.assert_allclose(kept[0, 1:], [40, 40, 60, 60])


def test_mosaic_puts_every_tile_and_its_boxes_where_they_belong():
    size, colours = 64, (10, 60, 160, 250)
    shapes = [(64, 40), (30, 64), (64, 64), (50, 64)]
    corners = set()
    for seed in range(20):
        tiles = [tile(np.full((*shape, 3), colour, np.uint8)) for shape, colour in zip(shapes, colours, strict=True)]
        whole = np.array([[0, 0.5, 0.5, 1, 1]], np.float32)
        rows = [whole + np.eye(1, 5, dtype=np.float32) * number for number in range(4)]
        canvas, labels = subject.mosaic(tiles, rows, size, np.random.default_rng(seed))
        canvas = canvas.draw(0, 0, canvas.width, canvas.height)
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


@pytest.mark.parametrize("hue", [0.015, 0.9, 3.0])
def test_hsv_equals_three_separate_tables(hue):
    image = np.random.default_rng(1).integers(0, 256, (50, 40, 3), np.uint8)
    for seed in range(30):
        gains = 1 + np.random.default_rng(seed).uniform(-1, 1, 3) * (hue, 0.7, 0.4)
        planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
        products = [np.rint(plane * gain) for plane, gain in zip(planes, gains, strict=True)]
        limited = [products[0] % 180, products[1].clip(0, 255), products[2].clip(0, 255)]
        expected = cv2.cvtColor(cv2.merge([plane.astype(np.uint8) for plane in limited]), cv2.COLOR_HSV2BGR)
        found = subject.shift_hsv(image, np.random.default_rng(seed), hue, 0.7, 0.4)
        difference = np.abs(found.astype(int) - expected)
        # A product at a half may round either way, and a hue that wraps is rounded elsewhere: two levels at most.
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.01


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


def test_copy_paste_equals_slices_of_rectangles():
    """Outlines are rectangles here, so what is pasted is a mirrored slice; two objects would hide each other."""
    image = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    labels = np.array([[1, 5, 10, 20, 30], [2, 30, 35, 45, 50], [3, 58, 35, 68, 50], [4, 2, 40, 8, 55]], np.float32)

    def outline(row):
        left, top, right, bottom = row[1:]
        return np.array([(left, top), (right - 1, top), (right - 1, bottom - 1), (left, bottom - 1)])

    polygons = [outline(labels[0]), outline(labels[1]), outline(labels[2]), None]
    pasted, rows = subject.copy_paste(image, labels, polygons, 1.0, np.random.default_rng(1))
    expected = image.copy()
    expected[10:30, 80:95] = image[10:30, 5:20][:, ::-1]
    # Of 2 and 3 each covers the other's box by more than 0.3 once it is mirrored; 4 has no outline.
    assert (pasted == expected).all()
    np.testing.assert_array_equal(rows, [*labels, [1, 80, 10, 95, 30]])


def test_copy_paste_takes_its_share_and_leaves_the_image_alone():
    image = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    before = image.copy()
    labels = np.array([[n, 5, 40 * n, 25, 40 * n + 20] for n in range(8)], np.float32)
    polygons = [np.array([(5, top), (25, top), (15, top + 20)]) for top in labels[:, 2]]
    for share, number in ((0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)):
        pasted, rows = subject.copy_paste(image, labels, polygons, share, np.random.default_rng(0))
        assert len(rows) == 8 + number and (pasted != before).any() == (number > 0)
        assert len({row[0] for row in rows[8:]}) == number
    assert (image == before).all()
    triangle = (pasted != before).any(-1)[:21, 370:400]  # the first one: 20 x 20 / 2 pixels, and its edges
    assert 180 < triangle.sum() < 250
