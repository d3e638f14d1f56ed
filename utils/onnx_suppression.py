"""Non-maximum suppression as standard operators at the end of an ONNX graph.

The file then returns, for every image, a table of fixed size and how many of its rows count:

    output0 (batch, detections, 6) float32: x1, y1, x2, y2 in input pixels, confidence, class; most confident first
    count   (batch,) int64: rows in use; those behind them are 0

It computes what ``utils.nms.non_max_suppression`` does for detect.py: one box for each decoded row, of its best class.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from utils.suppression import Suppression

DETECTIONS, COUNT = "output0", "count"
# Name of the decoded rows (batch, anchors, 5 + classes), which the graph no longer returns.
DECODED = "decoded"


class _Nodes:
    """Collects nodes and constants under names that no other node has."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, values: object, kind: type = np.int64) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, kind), f"nms_{name}"))
        return f"nms_{name}"

    def add(self, operator: str, inputs: Sequence[str], outputs: str | Sequence[str], **settings) -> str:
        """Appends a node and returns its first output."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        named = [name if name in (DETECTIONS, COUNT) else f"nms_{name}" for name in outputs]
        self.nodes.append(helper.make_node(operator, inputs, named, name=f"nms_{outputs[0]}_node", **settings))
        return named[0]

    def columns(self, source: str, first: int, last: int, name: str) -> str:
        """Columns ``first`` to ``last`` - 1 of the last of three axes."""
        limits = [self.constant(f"{name}_{end}", [value]) for end, value in (("first", first), ("last", last))]
        return self.add("Slice", [source, *limits, self.constant(f"{name}_axis", [2])], name)


def add_suppression(model: ModelProto, settings: Suppression) -> ModelProto:
    """Returns a copy of a detector's model that ends in suppression.

    Args:
        model: its first output is (batch, anchors, 5 + classes): centre x, y, width, height, objectness, class scores,
            float32. Its opset is 12 or newer.
        settings: thresholds and the size of the table.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    shape = graph.output[0].type.tensor_type.shape.dim
    batch = shape[0].dim_param or shape[0].dim_value
    anchors, classes = shape[1].dim_value, shape[2].dim_value - 5
    opset = next(entry.version for entry in result.opset_import if entry.domain in ("", "ai.onnx"))
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [DECODED if name == DETECTIONS else name for name in names]
    nodes = _Nodes()
    rows, confidence, scores, boxes = _candidates(nodes, classes, settings.agnostic)
    kept = _kept_confidence(nodes, boxes, scores, confidence, settings)
    _table(nodes, rows, kept, settings.max_detections, opset, padded=anchors < settings.max_detections)
    graph.node.extend(nodes.nodes)
    graph.initializer.extend(nodes.constants)
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(DETECTIONS, TensorProto.FLOAT, [batch, settings.max_detections, 6])
    )
    graph.output.append(helper.make_tensor_value_info(COUNT, TensorProto.INT64, [batch]))
    onnx.checker.check_model(result, full_check=True)
    return result


def _candidates(nodes: _Nodes, classes: int, agnostic: bool) -> tuple[str, str, str, str]:
    """Decoded rows -> rows (B, N, 6) as they are returned, their confidence (B, N, 1), scores by class (B, classes or
    1, N) that are 0 for all but a row's best class, and boxes (B, N, 4) centre and size."""
    boxes = nodes.columns(DECODED, 0, 4, "boxes")
    objectness = nodes.columns(DECODED, 4, 5, "objectness")
    scores = nodes.add("Mul", [nodes.columns(DECODED, 5, 5 + classes, "classes"), objectness], "scores")
    # One operator whose form is the same in all opsets, where ReduceMax and ArgMax would be two.
    best = nodes.add("TopK", [scores, nodes.constant("one", [1])], ["confidence", "label"], axis=2)
    label = "nms_label"
    if agnostic:
        by_class = best
    else:
        numbers = nodes.constant("numbers", np.arange(classes))
        zero = nodes.constant("zero", 0.0, np.float32)
        is_best = nodes.add("Equal", [label, numbers], "is_best")
        by_class = nodes.add("Where", [is_best, scores, zero], "best_scores")
    by_class = nodes.add("Transpose", [by_class], "scores_by_class", perm=[0, 2, 1])
    half = nodes.add("Mul", [nodes.columns(boxes, 2, 4, "size"), nodes.constant("half", 0.5, np.float32)], "half_size")
    centre = nodes.columns(boxes, 0, 2, "centre")
    corners = [nodes.add("Sub", [centre, half], "corner"), nodes.add("Add", [centre, half], "other_corner")]
    number = nodes.add("Cast", [label], "label_number", to=TensorProto.FLOAT)
    rows = nodes.add("Concat", [*corners, best, number], "rows", axis=2)
    return rows, best, by_class, boxes


def _kept_confidence(nodes: _Nodes, boxes: str, scores: str, confidence: str, settings: Suppression) -> str:
    """Confidence (B, N) of the boxes that are kept, 0 for the others."""
    limits = [
        nodes.constant("most", [settings.max_detections]),
        nodes.constant("iou", [settings.iou], np.float32),
        nodes.constant("threshold", [settings.confidence], np.float32),
    ]
    kept = nodes.add("NonMaxSuppression", [boxes, scores, *limits], "kept", center_point_box=1)
    places = nodes.add("Gather", [kept, nodes.constant("batch_and_box", [0, 2])], "places", axis=1)
    flat = nodes.add("Reshape", [confidence, nodes.constant("two_axes", [0, -1])], "flat_confidence")
    values = nodes.add("GatherND", [flat, places], "kept_values")
    nothing = nodes.add("ConstantOfShape", [nodes.add("Shape", [flat], "flat_shape")], "nothing")
    return nodes.add("ScatterND", [nothing, places, values], "kept_confidence")


def _table(nodes: _Nodes, rows: str, kept: str, size: int, opset: int, padded: bool) -> None:
    """The best ``size`` rows of each image and their number; ``padded`` where there may be fewer rows than that."""
    if padded:
        for name, values in (("rows", rows), ("kept", kept)):
            ends = [0, 0, 0, 0, size, 0] if name == "rows" else [0, 0, 0, size]
            grown = nodes.add("Pad", [values, nodes.constant(f"{name}_ends", ends)], f"padded_{name}")
            rows, kept = (grown, kept) if name == "rows" else (rows, grown)
    nodes.add("TopK", [kept, nodes.constant("table_size", [size])], ["best", "index"], axis=1)
    index = nodes.add("Reshape", ["nms_index", nodes.constant("index_shape", [0, -1, 1])], "index_column")
    chosen = nodes.add("GatherND", [rows, index], "chosen", batch_dims=1)
    used = nodes.add("Greater", ["nms_best", nodes.constant("none", 0.0, np.float32)], "used")
    factor = nodes.add("Cast", [used], "used_factor", to=TensorProto.FLOAT)
    column = nodes.add("Reshape", [factor, nodes.constant("factor_shape", [0, -1, 1])], "used_column")
    nodes.add("Mul", [chosen, column], DETECTIONS)
    number = nodes.add("Cast", [used], "used_number", to=TensorProto.INT64)
    if opset >= 13:  # from here on its axes are an input
        nodes.add("ReduceSum", [number, nodes.constant("count_axis", [1])], COUNT, keepdims=0)
    else:
        nodes.add("ReduceSum", [number], COUNT, keepdims=0, axes=[1])
