"""benchmarks/val_speed.py: no second is counted twice or lost, and a whole small run."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_detector import float_detector, save

from utils.dataset_yaml import load_dataset_yaml

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("val_speed")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_a_stage_inside_another_is_counted_once(benchmark):
    class Work:
        def inner(self):
            time.sleep(0.02)
            return "done"

    clock, work = benchmark.Clock(), Work()
    clock.watch(Work, "inner", "network")
    started = time.perf_counter()
    with clock.stage("rest"):
        time.sleep(0.01)
        assert work.inner() == work.inner() == "done"
    took = time.perf_counter() - started
    assert sum(clock.seconds.values()) == pytest.approx(took, abs=0.002)
    assert clock.seconds["network"] >= 0.04 and clock.seconds["rest"] == pytest.approx(
        took - clock.seconds["network"], abs=1e-3
    )


def test_a_run_is_taken_apart(benchmark, tiny_dataset, tmp_path):
    model = float_detector("yolov5n.yaml")
    names = load_dataset_yaml(tiny_dataset).names
    model = type(model)("yolov5n.yaml", nc=len(names))
    model.names = names
    weights, report = save(model, tmp_path / "tiny.pt"), tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "val_speed.py"), "--child", str(report), str(time.time())]
    command += ["--weights", str(weights), "--data", str(tiny_dataset), "--imgsz", "96", "--batch-size", "2"]
    started = time.perf_counter()
    subprocess.run([*command, "--project", str(tmp_path / "runs"), "--workers", "0"], check=True, capture_output=True)
    found = json.loads(report.read_text())
    assert found["images"] == 4 and set(found["seconds"]) == set(benchmark.STAGES)
    assert found["total"] == pytest.approx(sum(found["seconds"].values()))
    assert found["total"] < time.perf_counter() - started
    measured = {stage for stage, seconds in found["seconds"].items() if seconds > 0}
    assert measured == set(benchmark.STAGES) - {"json"}
    assert 0 < found["alone"] < found["total"]
