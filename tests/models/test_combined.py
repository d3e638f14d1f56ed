"""Test-time augmentation and ensembles against passes that are put together by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_detector import SMALL

from models.backend import TorchBackend, load_backend
from models.combined import AugmentedBackend, Ensemble, combine, rescale
from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.errors import UserError


def saved(file, seed=0, names=("a", "b", "c")):
    """A checkpoint of a small random network."""
    torch.manual_seed(seed)
    model = DetectionModel(SMALL)
    content = {"format": 1, "model_yaml": model.yaml, "names": dict(enumerate(names)), "quantization": None}
    content |= {"stride": model.stride.tolist(), "anchors": model.detect.anchors, "phase": "float"}
    save_checkpoint(content | {"model": model.state_dict(), "ema": None}, file)
    return file


@pytest.fixture
def backend(tmp_path):
    return load_backend(saved(tmp_path / "one.pt"))


def test_augmented_rows_are_those_of_three_passes(backend):
    images = torch.rand(2, 3, 96, 160)
    rows, raw = AugmentedBackend(backend)(images)
    expected = []
    for scale, flipped, kept in ((1.0, False, (0,)), (0.83, True, (0, 1)), (0.67, False, (1,))):
        view = images.flip(3) if flipped else images
        height, width = int(96 * scale), int(160 * scale)
        canvas = torch.full((2, 3, *(math.ceil(side * scale / 16) * 16 for side in (96, 160))), 0.447)
        canvas[..., :height, :width] = F.interpolate(view, (height, width), mode="bilinear")
        maps = backend(canvas)[1]
        for level in kept:
            part = backend.model.detect.decode(maps[level], level)
            x, y, w, h = (part[..., i] / scale for i in range(4))
            expected.append(torch.cat((torch.stack((160 - x if flipped else x, y, w, h), -1), part[..., 4:]), -1))
    assert raw is None and backend.model.detect.nl == 2
    torch.testing.assert_close(rows, torch.cat(expected, 1), rtol=1e-3, atol=1e-3)


def test_scaled_images_are_padded_to_the_stride():
    images = torch.rand(1, 3, 64, 64)
    assert rescale(images, 1.0, 32) is images
    small = rescale(images, 0.67, 32)
    assert small.shape == (1, 3, 64, 64) and bool((small[..., 42:] == 0.447).all()) and small[..., 41].std() > 0


def test_an_ensemble_has_the_rows_of_all(backend, tmp_path):
    other = load_backend(saved(tmp_path / "two.pt", seed=1))
    images = torch.rand(1, 3, 64, 64)
    joined = combine([backend, other], augment=False)
    assert isinstance(joined, Ensemble) and joined.is_pt
    torch.testing.assert_close(joined(images)[0], torch.cat((backend(images)[0], other(images)[0]), 1))
    both = combine([backend, other], augment=True)
    assert both(images)[0].shape[1] == 2 * AugmentedBackend(backend)(images)[0].shape[1]
    assert combine([backend], augment=False) is backend and isinstance(backend, TorchBackend)


def test_other_classes_are_refused(backend, tmp_path):
    stranger = load_backend(saved(tmp_path / "three.pt", names=("x", "y", "z")))
    with pytest.raises(UserError, match="their classes differ"):
        combine([backend, stranger], augment=False)


def test_other_files_cannot_be_augmented(backend):
    with pytest.raises(UserError, match="PyTorch checkpoints"):
        combine([combine([backend, backend], augment=False)], augment=True)
