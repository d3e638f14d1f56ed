"""SiLU by integer operators: onnxruntime's own results for all 256 codes."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from quant.integer_silu import IntegerSilu, UniformGrid, find_integer_silu, wanted_codes

GRIDS = [
    (UniformGrid(0.3353, 100), UniformGrid(1.7649, 1, 0, 15)),
    (UniformGrid(0.0698, 120), UniformGrid(0.35, 1, 0, 15)),
    (UniformGrid(0.1883, 90), UniformGrid(0.4034, 2, 0, 15)),
    (UniformGrid(0.05, 128), UniformGrid(0.6, 1, 0, 7)),
]


def run(given, taken, numbers):
    """What onnxruntime makes of all codes."""
    constants = {
        "step": np.float32(given.step), "zero": np.uint8(given.zero_point), "step_in": np.float32(numbers.step_in),
        "step_sigmoid": np.float32(numbers.step_sigmoid), "none": np.uint8(0),
        "step_product": np.float32(numbers.step_product), "zero_out": np.uint8(taken.zero_point),
        "low": np.uint8(taken.low), "high": np.uint8(taken.high),
    }  # fmt: skip
    own = {"domain": "com.microsoft"}
    product = ["codes", "step", "zero", "sigmoid", "step_sigmoid", "none", "step_product", "zero_out"]
    nodes = [
        helper.make_node("QLinearSigmoid", ["codes", "step_in", "zero", "step_sigmoid", "none"], ["sigmoid"], **own),
        helper.make_node("QLinearMul", product, ["wide"], **own),
        helper.make_node("Clip", ["wide", "low", "high"], ["found"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.UINT8, [256]) for name in ("codes", "found")]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "silu", values[:1], values[1:], stored)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"codes": np.arange(256, dtype=np.uint8)})[0]


@pytest.mark.parametrize(("given", "taken"), GRIDS)
def test_every_code_is_what_float_arithmetic_gives(given, taken):
    numbers = find_integer_silu(given, taken)
    assert numbers is not None
    x = (torch.arange(256) - given.zero_point) * np.float32(given.step)
    expected = torch.round(torch.nn.functional.silu(x) / np.float32(taken.step)) + taken.zero_point
    expected = expected.clamp(taken.low, taken.high).numpy()
    np.testing.assert_array_equal(wanted_codes(given, taken), expected)
    np.testing.assert_array_equal(run(given, taken, numbers), expected)
    assert len(np.unique(expected)) > 5


def test_rounding_the_sigmoid_alone_would_not_do():
    given, taken = GRIDS[1]
    plain = IntegerSilu(given.step, 1 / 255, taken.step)
    assert (run(given, taken, plain) != wanted_codes(given, taken)).any(), "a test of nothing"


def test_where_256_levels_are_wanted_there_is_nothing_to_find():
    assert find_integer_silu(UniformGrid(0.1369, 50), UniformGrid(0.0699, 4)) is None


def test_the_search_is_repeatable():
    assert find_integer_silu(*GRIDS[0]) == find_integer_silu(*GRIDS[0])
