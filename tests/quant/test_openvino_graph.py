"""Clips merged into OpenVINO's quantizers: OpenVINO itself says whether codes stay what they were."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_detector import SIZE, images, quantized_detector

from models.openvino_backend import in_openvino
from quant.export_head import matrix_head
from quant.fold import fold
from quant.onnx_graph import build, trace, traceable
from quant.openvino_graph import merge_clips
from quant.verify import references, verify

openvino = pytest.importorskip("openvino")


def read(model, folder):
    onnx.save(model, str(folder / "model.onnx"))
    return openvino.Core().read_model(str(folder / "model.onnx"))


def run(model, batch):
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled([batch])
    return {name: results[port].copy() for port in compiled.outputs for name in port.get_names()}


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


@pytest.mark.parametrize(("low", "high", "zero_point", "kind"), [(0, 15, 3, np.uint8), (-7, 7, 0, np.int8)])
def test_a_clipped_quantizer_becomes_one_of_fewer_levels(tmp_path, low, high, zero_point, kind):
    step = np.float32(0.37)
    constants = {"s": step, "z": kind(zero_point), "low": kind(low), "high": kind(high)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["wide"]),
        helper.make_node("Clip", ["wide", "low", "high"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 40, 50]) for name in "xy"]
    graph = helper.make_graph(
        nodes, "test", values[:1], values[1:], [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    )
    model = read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path)
    assert merge_clips(model) == 1 and merge_clips(model) == 0
    assert not {"Maximum", "Minimum", "Clamp"} & set(kinds(model))
    x = np.linspace(-30 * step, 30 * step, 2000, dtype=np.float32)
    x[:4] = (-1e30, 1e30, 0, -0.0)
    position = x.astype(np.float64) / np.float64(step) + zero_point
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-4
    expected = (np.clip(np.round(position), low, high) - zero_point) * step
    found = run(model, x.reshape(1, 1, 40, 50))["y"].reshape(-1)
    np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-5, atol=1e-5)
    assert clear.mean() > 0.99 and len(np.unique(found.round(3))) == high - low + 1


@pytest.mark.parametrize(("bits", "gabfusion"), [(4, True), (2, False), (8, False)])
def test_every_layer_computes_the_codes_of_the_network(tmp_path, bits, gabfusion):
    folded = fold(quantized_detector(bits, gabfusion))
    folded.model[-1].export = True
    exported = build(trace(traceable(matrix_head(folded)), torch.zeros(1, 3, SIZE, SIZE)))
    model = read(exported.model, tmp_path)
    merged = merge_clips(model)
    assert (merged > 5) == (bits < 8)
    assert "Minimum" not in kinds(model)
    openvino.save_model(model, str(tmp_path / "merged.xml"), compress_to_fp16=False)
    result = verify(folded, exported, references(folded, list(images(1))), in_openvino(tmp_path / "merged.xml"))
    assert result.holds and result.layers.unexplained == 0, result.table()
    assert result.layers.compared > 10_000


def test_floats_are_left_alone(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([node], "test", values[:1], values[1:])
    model = read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path)
    assert merge_clips(model) == 0
