"""benchmarks/inference_cost.py: what it counts, and that it refuses pairs that say nothing."""

import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import inference_cost
from deploy import Row


def test_ratio_is_a_median_over_rounds_with_quartiles():
    own, other = (Row(None, lambda image: None, rounds) for rounds in ([10, 22, 30, 44, 50], [10, 20, 30, 40, 50]))
    assert inference_cost.ratio(own, other) == "1.000 [1.000, 1.100]"


def test_nodes_are_counted_by_operator():
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    nodes.append(helper.make_node("Neg", ["z"], ["out"]))
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [result]))
    assert inference_cost.operators(model) == {"Relu": 2, "Neg": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--without", "a", "b", "--with", "c"], "--without names 2 runs, --with 1"),
        (["--without", "nowhere", "--with", "nowhere"], "nowhere: no weights/last.pt"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, caplog):
    assert inference_cost.main(arguments) == 1
    assert message in caplog.text
