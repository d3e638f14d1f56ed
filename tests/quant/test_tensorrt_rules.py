"""TensorRT's rules for explicit quantization, checked on the graph of a whole detector. TensorRT itself has not run it.

The rules are those of its guide: quantize what convolutions read (inputs and weights), not what they write; keep
Conv + SiLU together; quantize the shortcut of a residual sum; one scale on everything that a Concat joins; int8, zero
point 0; boxes are decoded in float.
"""

import collections

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from small_detector import SIZE, float_detector, images, save

from exporting.onnx_files import OnnxPlan, OnnxWriter
from exporting.subject import read_subject
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.prepare import prepare


class Graph:
    """A file's nodes, with what stands before and behind each."""

    def __init__(self, model):
        self.nodes = list(model.graph.node)
        self.made_by = {name: node for node in self.nodes for name in node.output}
        self.readers = collections.defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def of(self, kind):
        return [node for node in self.nodes if node.op_type == kind]

    def before(self, node, index=0):
        return self.made_by.get(node.input[index])

    def behind(self, node):
        return self.readers[node.output[0]]


@pytest.fixture(scope="module", params=[4, 8])
def graph(request, tmp_path_factory):
    keys = {"target": "tensorrt", "gabfusion": True}
    keys |= {"weight": {"bits": request.param}, "activation": {"bits": request.param}}
    model = prepare(float_detector(), QuantConfig.from_dict(keys))
    calibrate(model, [images(4, seed=2)])
    for module in model.modules():
        if hasattr(module, "set_strength"):
            module.set_strength(0.0)
    path = save(model.eval(), tmp_path_factory.mktemp("detector") / "best.pt")
    writer = OnnxWriter(read_subject(path, [SIZE], torch.device("cpu")))
    return Graph(writer.build(OnnxPlan()).model)


def test_every_quantize_is_followed_by_its_dequantize_only(graph):
    quantizers = graph.of("QuantizeLinear")
    assert len(quantizers) > 20
    for node in quantizers:
        (behind,) = graph.behind(node)
        assert behind.op_type == "DequantizeLinear"
        assert graph.constants[behind.input[1]] == graph.constants[node.input[1]]
        for end in (node, behind):
            zero = graph.constants[end.input[2]]
            assert zero.dtype == np.int8 and not zero.any()


def test_convolutions_read_dequantized_inputs_and_weights(graph):
    convolutions = graph.of("Conv")
    assert len(convolutions) > 20
    for node in convolutions:
        features, weights = graph.before(node, 0), graph.before(node, 1)
        assert features.op_type == weights.op_type == "DequantizeLinear"
        assert graph.before(features).op_type == "QuantizeLinear", "of the input, not of what made it"
        assert graph.constants[weights.input[0]].dtype == np.int8
        axis = {attribute.name: helper.get_attribute_value(attribute) for attribute in weights.attribute}["axis"]
        scale = graph.constants[weights.input[1]]
        assert axis == 0 and scale.shape == graph.constants[weights.input[0]].shape[:1], "a scale per output channel"


def test_nothing_stands_between_a_convolution_and_its_silu(graph):
    activated = 0
    for node in graph.of("Conv"):
        kinds = sorted(reader.op_type for reader in graph.behind(node))
        assert kinds in (["Mul", "Sigmoid"], ["Reshape"]), "SiLU at once, or boxes"
        activated += kinds == ["Mul", "Sigmoid"]
    assert activated == len(graph.of("Conv")) - 2  # levels of the head


def test_shortcuts_are_quantized_and_sums_computed_from_values(graph):
    residual = [
        node
        for node in graph.of("Add")
        if {graph.before(node, index).op_type for index in range(2) if graph.before(node, index)}
        == {"DequantizeLinear", "Mul"}
    ]
    assert len(residual) == 3  # one for each bottleneck of the backbone
    for node in residual:
        (shortcut,) = [source for source in map(graph.made_by.get, node.input) if source.op_type == "DequantizeLinear"]
        readers = graph.behind(shortcut)
        assert any(reader.op_type == "Conv" for reader in readers), "the tensor that the first convolution reads"


def test_a_concat_of_codes_has_one_scale_on_all_sides(graph):
    joined = 0
    for node in graph.of("Concat"):
        sources = [graph.made_by.get(name) for name in node.input]
        if not all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
            continue
        joined += 1
        scales = {float(graph.constants[source.input[1]]) for source in sources}
        (behind,) = graph.behind(node)
        assert behind.op_type == "QuantizeLinear" and scales == {float(graph.constants[behind.input[1]])}
    assert joined == 2  # those of the neck, whose branches have grids of their own


def test_codes_of_fewer_bits_are_clipped_as_values(graph):
    for node in graph.of("Clip"):
        (behind,) = graph.behind(node)
        assert behind.op_type == "QuantizeLinear"


def test_boxes_are_decoded_in_float(graph):
    heads = [node for node in graph.of("Conv") if graph.behind(node)[0].op_type == "Reshape"]
    assert len(heads) == 2
    waiting, seen = [reader for node in heads for reader in graph.behind(node)], set()
    while waiting:
        node = waiting.pop()
        assert node.op_type not in ("QuantizeLinear", "DequantizeLinear", "MatMul")
        seen.add(node.op_type)
        waiting += graph.behind(node)
    assert {"Sigmoid", "Concat"} <= seen
