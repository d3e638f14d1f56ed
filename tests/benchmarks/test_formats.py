"""benchmarks/formats.py on a small network: one row per format, with numbers or a reason."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_detector import SMALL

from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.dataset_yaml import load_dataset_yaml
from utils.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("formats")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def arguments(tiny_dataset, tmp_path):
    names = load_dataset_yaml(tiny_dataset).names
    torch.manual_seed(0)
    model = DetectionModel(SMALL, nc=len(names))
    content = {"format": 1, "model_yaml": model.yaml, "names": names, "stride": model.stride.tolist(), "ema": None}
    content |= {"anchors": model.detect.anchors, "model": model.state_dict(), "phase": "float", "quantization": None}
    save_checkpoint(content, tmp_path / "small.pt")
    weights = ["--weights", str(tmp_path / "small.pt"), "--data", str(tiny_dataset), "--imgsz", "64"]
    return [*weights, "--project", str(tmp_path / "runs"), "--device", "cpu"]


def test_every_format_has_a_row(benchmark, arguments, tmp_path, capsys):
    rows = benchmark.run(benchmark.parse_options([*arguments, "--include", "onnx", "tflite", "coreml"]))
    assert [row.name for row in rows] == ["PyTorch", "onnx", "tflite", "coreml"]
    for row in rows[:2]:
        assert row.megabytes > 0 and row.milliseconds > 0 and not row.problem
        assert row.megabytes == pytest.approx(row.file.stat().st_size / 1e6)
    assert rows[1].map50 == pytest.approx(rows[0].map50, abs=0.02)
    assert all(row.problem == "not written here" and not row.failed for row in rows[2:])
    with (tmp_path / "runs" / "exp" / "formats.csv").open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == benchmark.HEADER and len(table) == 5 and len({len(line) for line in table}) == 1
    assert "| onnx |" in capsys.readouterr().out
    assert not (tmp_path / "small.onnx").exists()  # beside the weights nothing is written


def test_flags(benchmark, arguments, tmp_path):
    options = benchmark.parse_options([])
    values = (options.imgsz, options.batch_size, options.half, options.test, options.pt_only, options.hard_fail)
    assert values == (640, 1, False, False, False, None)
    assert benchmark.parse_options(["--hard-fail"]).hard_fail == 0.0
    assert benchmark.parse_options(["--hard-fail", "0.29", "--img", "320", "--batch", "2"]).hard_fail == 0.29
    alone = benchmark.run(benchmark.parse_options([*arguments, "--pt-only", "--test"]))
    assert len(alone) == 1 and alone[0].megabytes > 0 and alone[0].milliseconds == 0


def test_hard_fail(benchmark, arguments, capsys):
    assert benchmark.main([*arguments, "--pt-only", "--hard-fail"]) == 0
    assert benchmark.main([*arguments, "--pt-only", "--hard-fail", "0.99"]) == 1
    assert "is under 0.99" in capsys.readouterr().out
    broken = [benchmark.Row("onnx", problem="cannot be loaded", failed=True)]
    with pytest.raises(UserError, match="onnx: cannot be loaded"):
        benchmark.check(broken, benchmark.parse_options(["--hard-fail"]))
    benchmark.check(broken, benchmark.parse_options([]))
    assert benchmark.main(["--weights", "nowhere.pt"]) == 1


def test_a_file_that_cannot_be_measured_is_a_row_too(benchmark, arguments, tiny_dataset, tmp_path):
    other = tiny_dataset.with_name("other.yaml")
    other.write_text(yaml.safe_dump(yaml.safe_load(tiny_dataset.read_text()) | {"names": ["a"] * 7}))
    changed = [str(other) if part == str(tiny_dataset) else part for part in arguments]
    (row,) = benchmark.run(benchmark.parse_options([*changed, "--pt-only"]))
    assert row.failed and "names 7" in row.problem
