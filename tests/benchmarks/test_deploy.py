"""What benchmarks/deploy.py computes from times, and the convolution that it measures the integer limit with."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import deploy


def row(path, *rounds):
    return deploy.Row(path, lambda image: None, list(rounds))


def test_ratios_are_medians_over_rounds_against_the_fastest():
    slow, quick = row(None, 30.0, 90.0, 30.0), row(None, 20.0, 60.0, 24.0)
    own = row(None, 10.0, 20.0, 16.0)
    assert deploy.faster(own, [slow, quick]) == pytest.approx(2.0)
    assert deploy.faster(own, [slow]) == pytest.approx(3.0)


def test_the_table_compares_with_float_of_the_same_runtime(tmp_path):
    whole, small = tmp_path / "float.onnx", tmp_path / "small.xml"
    whole.write_bytes(bytes(1000))
    small.write_bytes(bytes(100))
    small.with_suffix(".bin").write_bytes(bytes(150))
    rows = {
        "onnxruntime, float32": row(whole, 20.0),
        "OpenVINO, float32": row(whole, 40.0),
        "OpenVINO, speed file": row(small, 10.0),
    }
    assert deploy.table(rows)[-1] == "| OpenVINO, speed file | 0.00 | 1/4.00 | 10.0 | 2.00 | 4.00 |  |"


def test_the_large_convolution_is_run_in_integers(tmp_path):
    onnx.save_model(deploy.large_convolution(16, 8), str(tmp_path / "large.onnx"))
    image = np.zeros((1, 16, 8, 8), np.float32)
    profile = deploy.profile_onnxruntime(tmp_path / "large.onnx", image, 1, tmp_path, runs=2)
    assert profile["QLinearConv"] > 0 and "Conv" not in profile


def test_turns_leave_out_the_first_round():
    calls = []
    rows = {name: deploy.Row(None, lambda image, name=name: calls.append(name)) for name in "ab"}
    deploy.take_turns(rows, np.zeros(1), 2)
    assert [len(one.rounds) for one in rows.values()] == [2, 2]
    assert calls == (["a"] * 4 + ["b"] * 4) * 3
