"""From an exported graph to the form that onnxruntime's CPU kernels run fastest where convolutions' results are codes.

With ``activation.output: 8`` onnxruntime convolves in integers (QLinearConv). What is left is written so (times are of
yolov5n at 640 pixels, two threads):

    SiLU                 QLinearSigmoid and QLinearMul with numbers for which all 256 codes come out as the network's
                         (``quant.integer_silu``). Where there are none, and in front of a float sum,
                         com.microsoft.QuickGelu: as Sigmoid and Mul the two get a DequantizeLinear each, because
                         onnxruntime gives every reader its own, and then no longer recognises them.
    first convolution    6x6 over 3 channels with stride 2 becomes 3x3 over 12 channels behind SpaceToDepth, the same
                         sums in another order: 3.0 ms instead of 6.8, and 1.1 for SpaceToDepth.
    head                 com.microsoft.MatMulIntegerToFloat in place of DequantizeLinear, MatMul and Add.

All three change no code. OpenVINO reads these operators too. SiLU in nanoseconds a value: DequantizeLinear, QuickGelu
and QuantizeLinear together 1.1, QLinearSigmoid and QLinearMul 0.63, a table by Gather 5.7 and a Cast of 0.55.
"""

import copy
from collections.abc import Callable

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

from quant.integer_silu import UniformGrid, find_integer_silu
from quant.onnx_graph import ExportedGraph, attributes, producers, remove_unused

DOMAIN = "com.microsoft"


def for_onnxruntime(exported: ExportedGraph) -> ExportedGraph:
    """Returns the graph with onnxruntime's own operators; ``exported`` is not changed.

    Args:
        exported: from ``quant.onnx_graph.build``; inner tensors that it names keep their names.
    """
    model = copy.deepcopy(exported.model)
    done = sum(write(model.graph) for write in (fuse_silu, widen_first_convolution, fuse_products))
    if done:
        remove_unused(model.graph)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    # A quantizer that became part of an integer SiLU has no float tensor in front any more.
    made = {name for node in model.graph.node for name in node.output} | {i.name for i in model.graph.input}
    quantizers = [place for place in exported.quantizers if place.source in made]
    return ExportedGraph(model, dict(exported.codes), quantizers, exported.decoded)


def _replace(graph: GraphProto, write: Callable[[NodeProto], list[NodeProto] | None]) -> int:
    """Puts the nodes that ``write`` returns in place of a node; None leaves it. Returns how many were replaced."""
    replaced, nodes = 0, []
    for node in graph.node:
        new = write(node)
        replaced += new is not None
        nodes += [copy.deepcopy(node)] if new is None else new
    del graph.node[:]
    graph.node.extend(nodes)
    return replaced


def fuse_silu(graph: GraphProto) -> int:
    """Writes x * Sigmoid(x), where x was dequantized, in integers or as QuickGelu. Returns how many were written."""
    made_by = producers(graph.node)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    integer: dict[str, list[NodeProto]] = {}  # codes of a QuantizeLinear -> what computes them without it

    def in_integers(product: NodeProto, source: NodeProto) -> bool:
        behind = readers.get(product.output[0], [])
        if product.output[0] in outputs or any(node.op_type != "QuantizeLinear" for node in behind):
            return False
        written = {
            node.output[0]: _integer_silu(graph, source, node, readers.get(node.output[0], []), constants)
            for node in behind
        }
        if None in written.values():
            return False
        integer.update(written)
        return True

    def write(node: NodeProto) -> list[NodeProto] | None:
        if node.op_type == "QuantizeLinear":
            return integer.get(node.output[0])
        sigmoid = made_by.get(node.input[1]) if node.op_type == "Mul" else None
        source = made_by.get(node.input[0]) if sigmoid is not None else None
        if source is None or sigmoid.op_type != "Sigmoid" or sigmoid.input[0] != node.input[0]:
            return None
        if source.op_type != "DequantizeLinear":
            return None
        if in_integers(node, source):
            return []
        return [helper.make_node("QuickGelu", node.input[:1], node.output, node.name, domain=DOMAIN, alpha=1.0)]

    return _replace(graph, write)


def _integer_silu(
    graph: GraphProto, source: NodeProto, quantize: NodeProto, behind: list[NodeProto], constants: dict[str, np.ndarray]
) -> list[NodeProto] | None:
    """QLinearSigmoid and QLinearMul in place of DequantizeLinear ``source``, SiLU and ``quantize``, or None."""
    step, zero_point, step_out, zero_out = (constants.get(name) for name in (*source.input[1:3], *quantize.input[1:3]))
    if any(value is None for value in (step, zero_point, step_out, zero_out)):
        return None
    if (zero_point.dtype, zero_out.dtype) != (np.uint8, np.uint8) or step.size != 1:
        return None
    low, high = 0, 255
    if len(behind) == 1 and behind[0].op_type == "Clip":
        low, high = (int(constants[name]) for name in behind[0].input[1:3])
    found = find_integer_silu(
        UniformGrid(float(step), int(zero_point)), UniformGrid(float(step_out), int(zero_out), low, high)
    )
    if found is None:
        return None
    codes, output = source.input[0], quantize.output[0]
    names = {}
    for name, value in (("in", found.step_in), ("sigmoid", found.step_sigmoid), ("product", found.step_product)):
        names[name] = f"{output}.step_{name}"
        graph.initializer.append(numpy_helper.from_array(np.asarray(np.float32(value)), names[name]))
    names["zero"] = f"{output}.zero"
    graph.initializer.append(numpy_helper.from_array(np.asarray(np.uint8(0)), names["zero"]))
    sigmoid, sigmoid_grid = f"{output}.sigmoid", [names["sigmoid"], names["zero"]]
    first = [codes, names["in"], source.input[2], *sigmoid_grid]
    second = [codes, *source.input[1:3], sigmoid, *sigmoid_grid, names["product"], quantize.input[2]]
    return [
        helper.make_node("QLinearSigmoid", first, [sigmoid], f"{quantize.name}.sigmoid", domain=DOMAIN),
        helper.make_node("QLinearMul", second, [output], quantize.name, domain=DOMAIN),
    ]


def fuse_products(graph: GraphProto) -> int:
    """Writes dequantized codes times dequantized, transposed weights plus bias as one operator."""
    made_by = producers(graph.node)
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def write(node: NodeProto) -> list[NodeProto] | None:
        product = made_by.get(node.input[0]) if node.op_type == "Add" else None
        if product is None or product.op_type != "MatMul":
            return None
        features, transpose = (made_by.get(name) for name in product.input)
        weight = made_by.get(transpose.input[0]) if transpose is not None and transpose.op_type == "Transpose" else None
        if features is None or weight is None or node.input[1] not in constants:
            return None
        if (features.op_type, weight.op_type) != ("DequantizeLinear",) * 2 or weight.input[0] not in constants:
            return None
        turned = f"{weight.input[0]}.turned"
        values = np.ascontiguousarray(numpy_helper.to_array(constants[weight.input[0]]).T)
        graph.initializer.append(numpy_helper.from_array(values, turned))
        codes, scale, zero_point = features.input
        inputs = [codes, turned, scale, weight.input[1], zero_point, "", node.input[1]]
        return [helper.make_node("MatMulIntegerToFloat", inputs, node.output, node.name, domain=DOMAIN)]

    return _replace(graph, write)


def widen_first_convolution(graph: GraphProto) -> int:
    """Lets a convolution of the image's codes with stride 2 read four pixels as one of four times the channels."""
    made_by = producers(graph.node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = [name for node in graph.node for name in node.input]
    images = {value.name for value in graph.input}

    def convolution_of_the_image(node: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        if node.op_type != "Conv":
            return None
        features, weight = (made_by.get(name) for name in node.input[:2])
        if features is None or weight is None or features.op_type != "DequantizeLinear":
            return None
        quantize = made_by.get(features.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.input[0] not in images:
            return None
        alone = readers.count(node.input[0]) == 1 and readers.count(node.input[1]) == 1
        return (features, weight) if alone and weight.input[0] in constants and _halves(attributes(node)) else None

    found = [(node, pair) for node in graph.node if (pair := convolution_of_the_image(node)) is not None]
    for node, (features, weight) in found:
        tensor = constants[weight.input[0]]
        codes = numpy_helper.to_array(tensor)
        outputs, channels, kernel, _ = codes.shape
        half = kernel // 2
        # Channel (row of the pair, column of the pair, colour), as SpaceToDepth counts.
        blocks = codes.reshape(outputs, channels, half, 2, half, 2).transpose(0, 3, 5, 1, 2, 4)
        blocks = np.ascontiguousarray(blocks.reshape(outputs, 4 * channels, half, half))
        tensor.CopyFrom(numpy_helper.from_array(blocks, tensor.name))
        settings = {"kernel_shape": [half] * 2, "strides": [1, 1], "pads": [attributes(node)["pads"][0] // 2] * 4}
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in settings.items())
        deep = f"{features.input[0]}.deep"
        position = next(index for index, other in enumerate(graph.node) if other.output[0] == features.output[0])
        graph.node.insert(position, helper.make_node("SpaceToDepth", [features.input[0]], [deep], blocksize=2))
        features.input[0] = deep
    return len(found)


def _halves(settings: dict) -> bool:
    """Whether a convolution's settings are stride 2 with an even kernel and an even padding."""
    kernel, pads = settings["kernel_shape"], settings.get("pads", [0, 0, 0, 0])
    even = kernel[0] == kernel[1] and kernel[0] % 2 == 0 and len(set(pads)) == 1 and pads[0] % 2 == 0
    plain = settings.get("group", 1) == 1 and set(settings.get("dilations", [1])) == {1}
    return even and plain and list(settings.get("strides", [])) == [2, 2]
