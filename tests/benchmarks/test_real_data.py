"""benchmarks/real_data.py: what it reads from val.py, and results of an older version."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import val
from utils.metrics import MatchedBoxes, ap_per_class

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OLD = {"P": 0.671, "R": 0.753, "mAP50": 0.745, "mAP": 0.388}
NEW = {"P": 0.5, "R": 0.6, "mAP50": 0.7, "mAP": 0.4, "mAP75": 0.45, "matched": 0.875, "IoU": 0.8125, "class": 0.9375}


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("real_data")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_reads_what_val_prints(benchmark, capsys):
    table = ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0))
    matched = MatchedBoxes(0.25, 7, NEW["matched"], NEW["IoU"], NEW["class"])
    result = val.Evaluation(0.5, 0.6, 0.7, 0.4, table, 3, 8, map75=0.45, matched=matched)
    val.log_table(result, {0: "ring", 1: "all of it"}, verbose=True)
    assert benchmark.read_accuracy(capsys.readouterr().out) == NEW


def test_old_results_are_measured_again_or_kept(benchmark, tmp_path, capsys):
    weights, options = tmp_path / "last.pt", argparse.Namespace(imgsz=64, output=tmp_path)
    file = tmp_path / "last.pt.test.json"
    file.write_text(json.dumps(OLD))
    # The weights do not exist, so val.py fails: the old numbers stay.
    assert benchmark.accuracy(weights, "none.yaml", "test", options) == OLD == json.loads(file.read_text())
    assert "could not be measured again" in capsys.readouterr().out
    file.write_text(json.dumps(NEW))
    assert benchmark.accuracy(weights, "none.yaml", "test", options) == NEW


def test_table_has_gaps_for_what_was_not_measured(benchmark):
    lines = benchmark.table("set", "val", 3, 2, 1, [("float", OLD, None, None), ("w4a4 plain", NEW, OLD, 0.25)])
    heads, _, first, second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6])
    assert len(heads) == len(first) == len(second)
    old, new = dict(zip(heads, first, strict=True)), dict(zip(heads, second, strict=True))
    assert [old[key] for key in ("mAP50", "mAP75", "matched", "mean IoU", "class accuracy")] == [
        "0.745",
        "",
        "",
        "",
        "",
    ]
    assert [new[key] for key in ("mAP75", "matched", "mean IoU", "class accuracy")] == [
        "0.450", "0.875", "0.8125", "0.9375",
    ]  # fmt: skip
    assert new["gap mAP50"] == "-4.5" and new["ONNX mAP50 / mAP50-95"] == "0.745 / 0.388"
