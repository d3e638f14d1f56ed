"""A process may fork right behind a pool: its threads are gone for the operating system too."""

import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.threads import ThreadPool

TASKS = Path("/proc/self/task")
PIXELS = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)


def encode(_: int) -> int:
    cv2.resize(cv2.imdecode(cv2.imencode(".png", PIXELS)[1], cv2.IMREAD_COLOR), (64, 64))
    return threading.get_native_id()


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are listed by Linux only")
def test_no_thread_outlives_its_pool():
    before = set(TASKS.iterdir())
    for _ in range(60):  # of Python's own pool 115 of 300 left some
        with ThreadPool(4) as pool:
            used = set(pool.map(encode, range(8)))
        assert not [number for number in used if (TASKS / str(number)).exists()]
    assert set(TASKS.iterdir()) <= before


def test_what_a_thread_raises_comes_out():
    def fail(number: int) -> None:
        raise OSError(f"image {number}")

    with pytest.raises(OSError, match="image 3"), ThreadPool(2) as pool:
        list(pool.map(fail, [3]))
