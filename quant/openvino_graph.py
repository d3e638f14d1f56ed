"""From an exported ONNX graph to the form that OpenVINO's CPU plugin runs fastest.

A grid of b bits is written in ONNX as QuantizeLinear and Clip. OpenVINO reads a FakeQuantize with 256 levels, a Maximum
and a Minimum; it recognises the integers, but each clip is one more step behind every convolution. Its own FakeQuantize
has a number of levels: with the outermost levels as its limits it clips by itself. A 4-bit yolov5n's convolutions took
0.93 of their time (OpenVINO 2026.4, two threads of a processor with AMX, neighbouring runs).
"""

import numpy as np


def merge_clips(model) -> int:
    """Gives every quantizer followed by a clip the levels that the clip leaves. Codes stay what they were.

    Args:
        model: ``openvino.Model`` read from an ONNX file of ``quant.onnx_graph``; it is changed.

    Returns:
        How many clips were merged.
    """
    from openvino import opset13

    merged = 0
    for node in model.get_ordered_ops():
        clip = _clip_behind(node) if node.get_type_name() == "FakeQuantize" else None
        if clip is None:
            continue
        minimum, (lowest, highest), kind = clip
        limits = [_number(node.input_value(index)) for index in range(1, 5)]
        step = (limits[1] - limits[0]) / (limits[3] - limits[2])
        # In double precision: the limits are rounded once, as those that were read from the file were.
        zero = limits[0] - limits[2] * step
        ends = [zero + lowest * step, zero + highest * step, lowest, highest]
        constants = [opset13.constant(np.float32(end)) for end in ends]
        narrow = opset13.fake_quantize(node.input_value(0), *constants, round(highest - lowest) + 1)
        codes = opset13.convert(narrow, kind)
        codes.set_friendly_name(minimum.get_friendly_name())
        codes.output(0).set_names(minimum.output(0).get_names())
        for reader in minimum.output(0).get_target_inputs():
            reader.replace_source_output(codes.output(0))
        merged += 1
    if merged:
        model.validate_nodes_and_infer_types()
    return merged


def _clip_behind(quantizer):
    """The Minimum that ends FakeQuantize -> Convert -> Maximum -> Minimum, its limits and the codes' type, or None."""
    convert = _only_reader(quantizer, "Convert")
    maximum = _only_reader(convert, "Maximum")
    minimum = _only_reader(maximum, "Minimum")
    if minimum is None:
        return None
    limits = [_constant_operand(node) for node in (maximum, minimum)]
    if None in limits or int(quantizer.get_attributes()["levels"]) != 256:
        return None
    return minimum, limits, convert.get_output_element_type(0).get_type_name()


def _only_reader(node, kind: str):
    readers = list(node.output(0).get_target_inputs()) if node is not None else []
    reader = readers[0].get_node() if len(readers) == 1 else None
    return reader if reader is not None and reader.get_type_name() == kind else None


def _constant_operand(node) -> float | None:
    for index in range(2):
        source = node.input_value(index).get_node()
        if source.get_type_name() == "Constant":
            return _number(node.input_value(index))
    return None


def _number(output) -> float:
    return float(np.asarray(output.get_node().data, np.float64).reshape(-1)[0])
