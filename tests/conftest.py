"""Fixtures that several test folders use."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: one that fails is for who searches, not for who changes a word elsewhere.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """Label caches of read-only data sets go to a temporary folder instead of the user's."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("YOLOV5_QAT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set YOLOV5_QAT_DATA to where it lies")
    return folder


@pytest.fixture(scope="session")
def _drawn(tmp_path_factory) -> Path:
    from data.shapes import CLASSES, Drawing, draw_shapes

    root = tmp_path_factory.mktemp("drawn")
    draw_shapes(root / "tiny", seed=3, drawing=Drawing(train_images=8, val_images=4, image_size=96))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    (root / "tiny" / "tiny.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return root / "tiny"


@pytest.fixture
def tiny_dataset(_drawn, tmp_path) -> Path:
    """The YAML of a fresh copy of 8 training and 4 validation images (96 x 96, six classes)."""
    return Path(shutil.copytree(_drawn, tmp_path / "tiny")) / "tiny.yaml"
