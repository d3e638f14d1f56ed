"""onnxruntime's own operators in a file: the codes of the network, and the kernels that they are written for."""

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from small_detector import SMALL, float_detector, images

from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.export_head import matrix_head
from quant.fold import fold
from quant.onnx_graph import build, trace, traceable
from quant.onnxruntime_graph import for_onnxruntime
from quant.prepare import prepare
from quant.verify import references, verify

SIDE = 64


def folded_detector(output=8, bits=4, first=(8, 6, 2, 2)):
    config = {**SMALL, "backbone": [[-1, 1, "Conv", list(first)], *SMALL["backbone"][1:]]}
    keys = {"weight": {"bits": bits}, "activation": {"bits": bits, "output": output}}
    model = prepare(float_detector(config), QuantConfig.from_dict(keys))
    calibrate(model, [images(4, SIDE, SIDE, seed=2)])
    folded = fold(model.eval())
    folded.model[-1].export = True
    return folded


def exported_from(folded):
    return build(trace(traceable(matrix_head(folded)), torch.zeros(1, 3, SIDE, SIDE)))


def operators(model):
    return collections.Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_network(bits):
    folded = folded_detector(bits=bits)
    plain = exported_from(folded)
    exported = for_onnxruntime(plain)
    result = verify(folded, exported, references(folded, list(images(2, SIDE, SIDE))))
    assert result.holds, result.table()
    assert exported.codes == plain.codes and result.layers.compared > 10_000
    found = operators(exported.model)
    assert found["QuickGelu"] + found["QLinearSigmoid"] >= operators(plain.model)["Sigmoid"] - 2 * 3  # the head's
    assert found["QuickGelu"] >= 3, "in front of sums"
    assert bits == 8 or found["QLinearMul"] > 10
    assert len(exported.quantizers) == len(plain.quantizers) - found["QLinearMul"]
    assert found["MatMulIntegerToFloat"] == 2 * 3 and found["SpaceToDepth"] == 1
    assert "QuickGelu" not in operators(plain.model), "what is given stays as it is"


def test_onnxruntime_runs_it_in_integers(tmp_path):
    exported = for_onnxruntime(exported_from(folded_detector()))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exported.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = operators(onnx.load(str(tmp_path / "optimised.onnx")))
    assert "Conv" not in found and found["QLinearConv"] > 10
    assert found["DequantizeLinear"] <= 2 * found["QuickGelu"] + 6, "no reader has a DequantizeLinear of its own"


@pytest.mark.parametrize("first", [(8, 3, 2), (8, 4, 2, 1), (8, 6, 1, 2)])
def test_other_first_convolutions_stay(first):
    folded = folded_detector(first=first)
    plain = exported_from(folded)
    assert "SpaceToDepth" not in operators(for_onnxruntime(plain).model)


def test_four_pixels_as_one_give_the_same_sums():
    folded = folded_detector()
    exported = for_onnxruntime(exported_from(folded))
    first = folded.model[0].conv
    stored = {t.name: numpy_helper.to_array(t) for t in exported.model.graph.initializer}["model.0.conv.weight"]
    codes = first.weight_codes.numpy() * first.multiplier
    assert stored.shape == (8, 12, 3, 3)
    for row, column, colour, down, across in ((0, 0, 0, 0, 0), (1, 0, 2, 1, 2), (0, 1, 1, 2, 0), (1, 1, 2, 2, 2)):
        channel = (row * 2 + column) * 3 + colour
        np.testing.assert_array_equal(
            stored[:, channel, down, across], codes[:, colour, 2 * down + row, 2 * across + column]
        )


def test_a_file_without_quantized_results_has_only_its_head_written_anew():
    folded = folded_detector(output=None)
    exported = for_onnxruntime(exported_from(folded))
    assert "QuickGelu" not in operators(exported.model)
    result = verify(folded, exported, references(folded, list(images(1, SIDE, SIDE))))
    assert result.holds, result.table()
