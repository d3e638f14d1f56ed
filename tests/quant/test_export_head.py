"""Detect as matrix products: the same predictions, fewer bytes moved, codes still where ``verify`` looks for them."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from small_detector import SIZE, float_detector, images, quantized_detector

from quant.export_head import MatrixDetect, matrix_head
from quant.fold import fold
from quant.onnx_graph import build, trace, traceable
from quant.verify import references, verify


def folded_detector(bits=4, gabfusion=False):
    folded = fold(quantized_detector(bits, gabfusion))
    folded.model[-1].export = True
    return folded


def run(model, batch):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": batch.numpy()})[0]


def products(model):
    return [node for node in model.graph.node if node.op_type == "MatMul"]


@pytest.mark.parametrize("height", [SIZE, 2 * SIZE])
def test_the_predictions_are_those_of_detect(height):
    folded = folded_detector()
    batch = images(2, height, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(matrix_head(folded)(batch), folded(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "gabfusion"), [(4, True), (8, False)])
def test_files_with_it_compute_what_the_network_does(bits, gabfusion):
    folded = folded_detector(bits, gabfusion)
    exported = build(trace(traceable(matrix_head(folded)), torch.zeros(1, 3, SIZE, SIZE)))
    result = verify(folded, exported, references(folded, list(images(2))))
    assert result.holds, result.table()
    plain = build(trace(traceable(folded), torch.zeros(1, 3, SIZE, SIZE)))
    assert exported.codes.keys() == plain.codes.keys()
    assert len(products(exported.model)) == 2 * 3  # levels, anchors
    assert run(exported.model, images(1)).dtype == np.float32


def test_products_multiply_codes_of_one_byte_without_a_zero_point():
    folded = folded_detector()
    assert all(conv.input_quantizer.output_zero_point != 0 for conv in folded.model[-1].m), "a test of nothing"
    graph = build(trace(traceable(matrix_head(folded)), torch.zeros(1, 3, SIZE, SIZE))).model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type == "MatMul"]
    assert found
    for node in found:
        features, weights = (made_by[name] for name in node.input)
        assert features.op_type == "DequantizeLinear" and constants[features.input[2]] == 0
        assert made_by[features.input[0]].op_type == "Reshape", "what is transposed are codes"
        assert weights.op_type == "Transpose" and constants[made_by[weights.input[0]].input[0]].dtype == np.int8


def test_any_size_and_batch():
    folded = folded_detector()
    exported = build(trace(traceable(matrix_head(folded)), torch.zeros(1, 3, SIZE, SIZE), dynamic=True))
    batch = images(3, 32, 96)
    with torch.no_grad():
        expected = folded(batch)
    found = run(exported.model, batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)


def test_a_grid_that_another_layer_reads_too_keeps_its_name():
    folded = fold(quantized_detector(8))
    folded.model[-1].export = True
    shared = folded.model[-1].m[0].input_quantizer
    readers = [name for name, module in folded.named_modules(remove_duplicate=False) if module is shared]
    assert len(readers) > 1, "a test of nothing"
    exported = build(trace(traceable(matrix_head(folded)), torch.zeros(1, 3, SIZE, SIZE)))
    result = verify(folded, exported, references(folded, list(images(1))))
    assert result.holds, result.table()


def test_the_network_is_left_alone_and_a_float_one_is_returned_as_it_is():
    folded = folded_detector()
    before = type(folded.model[-1])
    replaced = matrix_head(folded)
    assert isinstance(replaced.model[-1], MatrixDetect) and type(folded.model[-1]) is before
    model = float_detector()
    assert matrix_head(model) is model
