import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.images import is_cut_off, letterbox, read_image, resize_to_long_side, write_image

# (height, width), arguments, shape, ratio, padding: computed with YOLOv5 v7.0
GOLDEN = [
    ((1080, 810), {}, (640, 480), 0.592593, (0.0, 0.0)),
    ((720, 1280), {}, (384, 640), 0.5, (0.0, 12.0)),
    ((375, 500), {}, (480, 640), 1.28, (0.0, 0.0)),
    ((333, 500), {"auto": False}, (640, 640), 1.28, (0.0, 107.0)),
    ((480, 640), {"auto": False}, (640, 640), 1.0, (0.0, 80.0)),
    ((100, 300), {"auto": False, "scale_up": False}, (640, 640), 1.0, (170.0, 270.0)),
    ((427, 640), {"new_shape": (448, 672), "auto": False, "scale_up": False}, (448, 672), 1.0, (16.0, 10.5)),
]


@pytest.mark.parametrize("shape, arguments, expected_shape, ratio, padding", GOLDEN)
def test_letterbox_equals_the_golden_values(shape, arguments, expected_shape, ratio, padding):
    image, ratios, found = letterbox(np.full((*shape, 3), 200, np.uint8), **arguments)
    assert image.shape == (*expected_shape, 3)
    assert ratios == pytest.approx((ratio, ratio), abs=1e-6)
    assert found == padding
    grey = (image == 114).all(-1)
    left, top = (round(value - 0.1) for value in padding)
    height, width = (round(side * ratio) for side in shape)
    assert not grey[top : top + height, left : left + width].any()
    assert grey.sum() == grey.size - height * width


def test_letterbox_can_stretch():
    image, ratios, padding = letterbox(np.zeros((50, 100, 3), np.uint8), (64, 64), auto=False, scale_fill=True)
    assert image.shape == (64, 64, 3)
    assert ratios == (0.64, 1.28)
    assert padding == (0, 0)


@pytest.mark.parametrize(
    "shape, size, expected",
    [
        ((427, 640), 320, (214, 320)),
        ((480, 640), 640, (480, 640)),
        ((334, 500), 640, (428, 640)),
        ((500, 1), 64, (64, 1)),
    ],
)
def test_the_short_side_is_rounded_up(shape, size, expected):
    assert resize_to_long_side(np.zeros((*shape, 3), np.uint8), size).shape[:2] == expected


def test_shrinking_averages_unless_told_otherwise():
    checks = np.zeros((64, 64, 3), np.uint8)
    checks[::4] = 255
    assert np.ptp(resize_to_long_side(checks, 16)) == 0
    assert (resize_to_long_side(checks, 16, smooth=False) != resize_to_long_side(checks, 16)).any()
    enlarged = resize_to_long_side(checks, 128)
    np.testing.assert_array_equal(enlarged, cv2.resize(checks, (128, 128), interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255, 0, 0
    pixels[8:, 24:] = 0, 255, 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(file, exif=exif, quality=100, subsampling=0)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))[..., ::-1]
    found = read_image(file)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 3


def test_unusual_pixels_become_three_bytes(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    cases = {"grey": grey, "deep": grey.astype(np.uint16) << 8, "alpha": np.dstack([grey] * 3 + [255 - grey])}
    for name, pixels in cases.items():
        assert cv2.imwrite(str(tmp_path / f"{name}.png"), pixels)
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png"), np.dstack([grey] * 3), err_msg=name)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_the_upper_eight(tmp_path, suffix, channels):
    deep = np.random.default_rng(0).integers(0, 65536, (20, 24, channels), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / f"deep{suffix}"), deep)
    image = read_image(tmp_path / f"deep{suffix}")
    expected = np.broadcast_to(deep // 256, (20, 24, 3))
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= 1  # whether a decoder cuts or rounds is its own affair


def test_paths_may_hold_any_letter(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (12, 14, 3), np.uint8)
    file = tmp_path / "Größe 画像.png"
    write_image(file, image)
    np.testing.assert_array_equal(read_image(file), image)


def test_what_is_no_image_is_refused_by_name(tmp_path):
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "PNG")
    for name, content in {"empty.jpg": b"", "text.png": b"hello", "cut.png": encoded.getvalue()[:20]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match=r"missing\.png"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match=r"\.xyz"):
        write_image(tmp_path / "a.xyz", np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_files_that_are_cut_off(suffix):
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    whole = cv2.imencode(suffix, picture)[1].tobytes()
    assert not is_cut_off(whole) and not is_cut_off(whole + b"\0\0tail")
    assert all(is_cut_off(whole[: int(len(whole) * share)]) for share in (0.3, 0.9, 0.99))
    assert not is_cut_off(b"no image")
