"""benchmarks/scaling.py: the fitted exponent, and that every row's work runs."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("scaling")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_is_the_slope_over_the_larger_sizes(benchmark, power):
    sizes = np.array([10.0, 20, 40, 80])
    seconds = 3e-3 * sizes**power
    assert benchmark.exponent(sizes, seconds) == pytest.approx(power)
    seconds[0] *= 50  # fixed costs of the small ones
    assert benchmark.exponent(sizes, seconds) == pytest.approx(power)


def test_a_quadratic_search_is_seen(benchmark):
    study = benchmark.Study("pairs", "rows", (500, 1000, 2000), lambda n: lambda: np.ones((n, n)).sum())
    assert benchmark.exponent(study.sizes, benchmark.measure(study)) > 1.4


def test_every_row_runs_at_its_smallest_size(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = benchmark.studies(benchmark.Folder(tmp_path, 250), tmp_path)
    axes = {study.axis for study in found}
    assert {"images", "objects per image", "classes", "batch"} <= axes
    for study in found:
        assert list(study.sizes) == sorted(study.sizes)
        study.make(study.sizes[0])()
