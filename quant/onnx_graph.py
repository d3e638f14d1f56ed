"""From a folded network to ONNX: one trace, then small passes over the graph, then one of two ways of writing it.

While tracing, every activation grid is one node ``ActivationGrid`` and every integer weight one node ``IntegerWeight``
of a private domain. The passes work on these, because a grid that is one node with its numbers as attributes is easily
moved, compared and merged. Only the last step, ``lower``, turns them into standard QuantizeLinear, Clip and
DequantizeLinear.

    x -> ActivationGrid                   becomes   x -> Quantize -> Dequantize        (split_grids)
    Dequantize, Dequantize -> Concat      becomes   Concat -> Dequantize               (sink_dequantizers)
    Concat | MaxPool | Resize -> Quantize becomes   Quantize -> Concat | MaxPool | ... (hoist_quantizers)

The first and the last are exact: quantizing is element by element and never decreasing, so it may be done before a
concatenation, a nearest-neighbour resize or a maximum. Afterwards these move codes of one byte instead of floats. For
TensorRT nothing is moved: it wants every QuantizeLinear next to its DequantizeLinear and moves them itself.

A grid with thresholds (N2UQ) counts those that are <= x. Standard operators for that, in onnxruntime 1.31 on one core,
nanoseconds a value for 3, 15 and 255 thresholds (a uniform grid takes 0.4):

    comparisons, each choosing between its code and the ones below (Where, uint8)     1.7     7.6    188
    comparisons, cast and added up as floats (Sum)                                    3.5      22    412
    comparisons, cast and added up as uint8 (not in onnxruntime 1.20)                 1.4     6.3    119
    binary search, next threshold chosen by Where                                     4.6      21    334
    binary search, next threshold looked up by Gather                                 8.9      28     82
    clipped ramps added up, then QuantizeLinear (not exact at the thresholds)         4.8      24    650

All but the last are exact. Written is the first up to 31 thresholds; with more it finds the neighbourhood (31 of them),
and Gather searches inside it.
"""

import copy
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from quant.fold import ActivationGrid, IntegerConv2d
from utils.errors import UserError

DOMAIN = "yolov5_qat"
INPUT_NAME = "images"
OUTPUT_NAME = "output0"
DEFAULT_OPSET = 17
INT4_OPSET = 21  # the first one with 4-bit tensors
# DequantizeLinear has one scale per channel from opset 13.
LOWEST_QUANTIZED_OPSET = 13
# Comparisons up to here, a search by Gather beyond.
_MOST_COMPARISONS = 31
# What the tracer writes; anything newer is converted afterwards, because its own newer opsets vary between versions.
_HIGHEST_TRACED_OPSET = 17
# Name of the smallest float32.
_LOWEST = "scale_lowest"
# Operators that only select or take the maximum of values along the first input.
_COMMUTE_WITH_QUANTIZE = ("MaxPool", "Resize", "Slice")


@dataclass
class QuantizerNode:
    """One QuantizeLinear of the file: the layer it came from, the float tensor it reads, the codes after clipping."""

    module: str
    source: str
    codes: str


@dataclass
class ExportedGraph:
    """An ONNX model and where the network's quantizers went.

    ``codes`` maps each call of an ``ActivationGrid`` module (``call_name``) to the integer tensor that stands where its
    output was (after a concatenation, if the quantizers were moved in front of it). ``decoded`` is the tensor with the
    network's output.
    """

    model: ModelProto
    codes: dict[str, str] = field(default_factory=dict)
    quantizers: list[QuantizerNode] = field(default_factory=list)
    decoded: str = OUTPUT_NAME


# --- tracing ---------------------------------------------------------------------------------------------------------


# Operators of their own for torch's dispatcher: the tracer records such a call as one node and never looks inside.
# (An autograd.Function with a ``symbolic`` is traced through, and some versions of torch stumble over what they find.)


# The schema is spelt out because torch 2.6 cannot infer one from list[float].
GRID_SCHEMA = "(Tensor x, float[] steps, int[] zero_points, int[] limits, float[] thresholds, str module) -> Tensor"


@torch.library.custom_op(f"{DOMAIN}::activation_grid", mutates_args=(), schema=GRID_SCHEMA)
def _activation_grid(
    x: Tensor,
    steps: Sequence[float],
    zero_points: Sequence[int],
    limits: Sequence[int],
    thresholds: Sequence[float],
    module: str,
) -> Tensor:
    if thresholds:
        codes = torch.bucketize(x, x.new_tensor(thresholds), right=True).to(x.dtype)
    else:
        codes = torch.clamp(torch.round(x / steps[0]) + zero_points[0], limits[0], limits[1])
    return (codes - zero_points[1]) * steps[1]


@torch.library.custom_op(f"{DOMAIN}::integer_weight", mutates_args=())
def integer_weight(codes: Tensor, scale: Tensor, bits: int, multiplier: int) -> Tensor:
    return codes.to(scale.dtype) * scale.reshape(-1, *[1] * (codes.dim() - 1))


@symbolic_helper.parse_args("v", "fs", "is", "is", "fs", "s")
def _activation_grid_symbolic(graph, x, steps, zero_points, limits, thresholds, module):
    grid = {"step_f": steps[0], "output_step_f": steps[1], "low_i": limits[0], "high_i": limits[1]}
    zero_point, output_zero_point = zero_points
    grid |= {"zero_point_i": zero_point, "output_zero_point_i": output_zero_point, "module_s": module}
    if thresholds:
        grid["thresholds_f"] = thresholds
    node = graph.op(f"{DOMAIN}::ActivationGrid", x, **grid)
    # Without a type the tracer could no longer see static shapes behind the first grid.
    node.setType(x.type())
    return node


@symbolic_helper.parse_args("v", "v", "i", "i")
def _integer_weight_symbolic(graph, codes, scale, bits, multiplier):
    node = graph.op(f"{DOMAIN}::IntegerWeight", codes, scale, bits_i=bits, multiplier_i=multiplier)
    node.setType(codes.type().with_dtype(torch.float32))
    return node


def _register_symbolics() -> None:
    for name, symbolic in (
        ("activation_grid", _activation_grid_symbolic),
        ("integer_weight", _integer_weight_symbolic),
    ):
        torch.onnx.register_custom_op_symbolic(f"{DOMAIN}::{name}", symbolic, 9)


class TracedGrid(nn.Module):
    def __init__(self, grid: ActivationGrid, name: str) -> None:
        super().__init__()
        steps = [float(grid.step), float(grid.output_step)]
        thresholds = [] if grid.thresholds is None else grid.thresholds.tolist()
        self.grid = (steps, [grid.zero_point, grid.output_zero_point], [grid.qmin, grid.qmax], thresholds, name)

    def forward(self, x: Tensor) -> Tensor:
        return _activation_grid(x, *self.grid)


class _TracedConvolution(nn.Module):
    """An ``IntegerConv2d`` whose weight is traced as integers. Buffers keep their names under the module's own."""

    def __init__(self, convolution: IntegerConv2d) -> None:
        super().__init__()
        for name, value in convolution.named_children():
            self.add_module(name, value)
        self.register_buffer("weight", convolution.weight_codes)
        self.register_buffer("scale", convolution.weight_scale)
        integer = convolution.bias_codes is not None
        self.register_buffer("bias", convolution.bias_codes if integer else convolution.bias)
        self.register_buffer("bias_scale", convolution.bias_scale)
        self.settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        self.bits, self.multiplier = int(convolution.container_bits), convolution.multiplier

    def forward(self, input: Tensor) -> Tensor:  # torch's name: some call with keywords
        before, after = getattr(self, "input_quantizer", None), getattr(self, "output_quantizer", None)
        x = input if before is None else before(input)
        weight = integer_weight(self.weight, self.scale, self.bits, self.multiplier)
        bias = self.bias if self.bias_scale is None else integer_weight(self.bias, self.bias_scale, 32, 1)
        x = F.conv2d(x, weight, bias, *self.settings)
        return x if after is None else after(x)


def traceable(model: nn.Module) -> nn.Module:
    """Returns a copy of a folded (or float) model in which grids and integer weights trace as nodes of ``DOMAIN``."""
    model = copy.deepcopy(model).eval()
    replaced: dict[nn.Module, nn.Module] = {}
    names = {module: name for name, module in model.named_modules()}

    def visit(parent: nn.Module) -> None:
        for child_name, child in list(parent.named_children()):
            if isinstance(child, ActivationGrid):
                replaced.setdefault(child, TracedGrid(child, names[child]))
            else:
                visit(child)
                if isinstance(child, IntegerConv2d):
                    replaced.setdefault(child, _TracedConvolution(child))
            if child in replaced:
                setattr(parent, child_name, replaced[child])

    visit(model)
    return model


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, TracedGrid | _TracedConvolution) for module in model.modules())


def trace(model: nn.Module, images: Tensor, opset: int = DEFAULT_OPSET, dynamic: bool = False) -> ModelProto:
    """Traces ``model(images) -> decoded`` with images (B, 3, H, W) and decoded (B, N, 5 + classes).

    The TorchScript tracer is used although torch prefers its newer exporter: a network without control flow needs
    nothing else, it takes a tenth of the time, leaves private nodes alone and writes the same file every time.

    Args:
        model: a model in evaluation mode that returns one tensor, e.g. from ``traceable``.
        opset: version of the standard operators, at most 17 here (``convert_opset`` raises it).
        dynamic: batch, height and width are left open.
    """
    axes = {INPUT_NAME: {0: "batch", 2: "height", 3: "width"}, OUTPUT_NAME: {0: "batch", 1: "anchors"}}
    buffer = io.BytesIO()
    _register_symbolics()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (images,),
            buffer,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes=axes if dynamic else None,
            opset_version=min(opset, _HIGHEST_TRACED_OPSET),
            custom_opsets={DOMAIN: 1} if _is_quantized(model) else None,
            do_constant_folding=True,
            dynamo=False,
        )
    traced = onnx.load_model_from_string(buffer.getvalue())
    with torch.no_grad():
        columns = model(images).shape[-1]
    # The tracer loses track of this number where height and width are open; it is the same for every image.
    last = traced.graph.output[0].type.tensor_type.shape.dim[-1]
    last.Clear()
    last.dim_value = columns
    return traced


# --- small tools -----------------------------------------------------------------------------------------------------


def attributes(node: NodeProto) -> dict:
    """Returns a node's attributes as Python values, strings decoded."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def producers(nodes: Iterable[NodeProto]) -> dict[str, NodeProto]:
    """Returns the node behind every tensor name."""
    return {name: node for node in nodes for name in node.output}


def _write_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    # Copies first: the nodes in the list may belong to the field that is about to be cleared.
    nodes = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)


def _redirect(graph: GraphProto, replacements: Mapping[str, str]) -> None:
    """Lets every reader of a key read the value instead; chains are followed."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            while name in replacements:
                name = replacements[name]
            node.input[index] = name


def _quantize(source: str, codes: str, grid: dict) -> NodeProto:
    return helper.make_node("Quantize", [source], [codes], domain=DOMAIN, **grid)


def _dequantize(codes: str, output: str, step: float, zero_point: int, signed: int) -> NodeProto:
    grid = {"step": step, "zero_point": zero_point, "signed": signed}
    return helper.make_node("Dequantize", [codes], [output], domain=DOMAIN, **grid)


# --- passes ----------------------------------------------------------------------------------------------------------


def tidy(graph: GraphProto) -> None:
    """Turns Constant nodes into initialisers and removes Identity nodes."""
    outputs = {value.name for value in graph.output}
    kept, replacements = [], {}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        elif node.op_type == "Identity" and node.output[0] not in outputs:
            replacements[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _write_nodes(graph, kept)
    _redirect(graph, replacements)


def call_name(module: str, number: int) -> str:
    """What call ``number`` (from 1) of a module is known by: its name, then name@2, name@3 on other tensors."""
    return module if number == 1 else f"{module}@{number}"


def hoist_factors(graph: GraphProto) -> None:
    """Moves constant factors of channels that stand in front of grids (``quant.equalize``) in front of what
    concatenates, repeats or takes a maximum, so that the grids can follow.

    Exact: multiplying by a positive number is element by element and never decreasing.
    """
    channels = _channels(graph)
    changed = True
    while changed:
        changed, nodes, made_by = False, [], producers(graph.node)
        stored = {tensor.name: tensor for tensor in graph.initializer}
        readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        for node in graph.node:
            behind = readers.get(node.output[0], [])
            grids = behind and all(reader.op_type in ("ActivationGrid", *_POOLS, "Concat") for reader in behind)
            factor = stored.get(node.input[1]) if node.op_type == "Mul" and grids else None
            source = made_by.get(node.input[0])
            moved = None
            if factor is not None and source is not None and len(factor.dims) == 3 and list(factor.dims[1:]) == [1, 1]:
                moved = _factor_in_front(graph, node, source, factor, channels)
            nodes.extend([node] if moved is None else moved)
            changed |= moved is not None
        _write_nodes(graph, nodes)


_POOLS = ("MaxPool", "Resize")


_KEEP_CHANNELS = {"ActivationGrid", "Add", "BatchNormalization", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul"}
_KEEP_CHANNELS |= {"PRelu", "Relu", "Sigmoid", "Softplus", "Tanh", *_POOLS}


def _channels(graph: GraphProto) -> dict[str, int]:
    """Tensor -> how many channels it has, as far as convolutions and what follows them tell."""
    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 4}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "IntegerWeight" and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
        elif node.op_type == "Conv" and node.input[1] in sizes:
            found[node.output[0]] = sizes[node.input[1]]
        elif node.op_type == "Concat" and all(name in found for name in node.input) and attributes(node)["axis"] == 1:
            found[node.output[0]] = sum(found[name] for name in node.input)
        elif node.op_type in _KEEP_CHANNELS:
            known = [found[name] for name in node.input if name in found]
            if known:
                found[node.output[0]] = max(known)
    return found


def _factor_in_front(
    graph: GraphProto, node: NodeProto, source: NodeProto, factor: TensorProto, channels: dict[str, int]
) -> list[NodeProto] | None:
    """What replaces ``source -> Mul node`` when the multiplication goes first, or None where it must not."""
    values = numpy_helper.to_array(factor)
    if source.op_type == "Concat" and attributes(source)["axis"] == 1:
        counts = [channels.get(name, 0) for name in source.input]
    elif source.op_type in _POOLS and len(source.output) == 1:
        if attributes(source).get("mode", "nearest") != "nearest":
            return None
        counts = [len(values)]
    else:
        return None
    # A network's own factors may be negative, and the maximum would become a minimum.
    if sum(counts) != len(values) or min(counts) < 1 or values.min() <= 0:
        return None
    moved, nodes, first = copy.deepcopy(source), [], 0
    for index, count in enumerate(counts):
        name, part = f"{node.output[0]}.{index}", f"{node.output[0]}.factor{index}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values[first : first + count]), part))
        nodes.append(helper.make_node("Mul", [source.input[index], part], [name]))
        channels[name] = count
        moved.input[index] = name
        first += count
    moved.output[0] = node.output[0]
    return [*nodes, moved]


def split_grids(graph: GraphProto) -> dict[str, str]:
    """Splits every ActivationGrid into Quantize and Dequantize. Returns module call -> name of its codes.

    Raises:
        UserError: a grid whose codes fit neither in uint8 nor in int8.
    """
    nodes, codes, calls = [], {}, {}
    for node in graph.node:
        if node.op_type != "ActivationGrid":
            nodes.append(node)
            continue
        grid = attributes(node)
        output_step, output_zero_point = grid.pop("output_step"), grid.pop("output_zero_point")
        module = grid["module"]
        signed = int(grid["low"] < 0)
        lowest, highest = (-128, 127) if signed else (0, 255)
        numbers = (grid["low"], grid["high"], grid["zero_point"], output_zero_point)
        if min(numbers) < lowest or max(numbers) > highest:
            raise UserError(
                f"{module}: codes {grid['low']} to {grid['high']} with zero points {grid['zero_point']} and "
                f"{output_zero_point} do not fit in 8 bits, which is all that an ONNX quantizer can hold"
            )
        name = f"{node.output[0]}.codes"
        seen = calls.setdefault(module, {})
        codes.setdefault(call_name(module, seen.setdefault(node.input[0], len(seen) + 1)), name)
        nodes.append(_quantize(node.input[0], name, {**grid, "signed": signed}))
        nodes.append(_dequantize(name, node.output[0], output_step, output_zero_point, signed))
    _write_nodes(graph, nodes)
    return codes


def check_symmetric(graph: GraphProto) -> None:
    """Raises UserError unless all codes are int8 with zero point 0, which is what TensorRT runs."""
    for node in graph.node:
        grid = attributes(node) if node.op_type in ("Quantize", "Dequantize") else {"zero_point": 0, "signed": 1}
        if grid.get("thresholds") or grid["zero_point"] != 0 or not grid["signed"]:
            raise UserError(
                f"{grid.get('module', node.output[0])}: TensorRT runs int8 codes with zero point 0 only; train with "
                "target: tensorrt in the recipe"
            )


def requantize_concats(graph: GraphProto) -> None:
    """Quantizes again what concatenates dequantized branches, by their own grid, which changes no value.

    TensorRT runs a convolution in int8 if DequantizeLinear stands right in front of it, and a Concat if all its inputs
    and its output have one scale.
    """
    made_by = producers(graph.node)
    nodes, replacements = [], {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = replacements.get(name, name)
        nodes.append(node)
        sources = [made_by.get(name) for name in node.input]
        if node.op_type != "Concat" or not all(source and source.op_type == "Dequantize" for source in sources):
            continue
        grid = attributes(sources[0])
        if any(attributes(source) != grid for source in sources):
            continue
        name = node.output[0]
        nodes.append(_quantize(name, f"{name}.again", {**grid, "low": -128, "high": 127}))
        nodes.append(_dequantize(f"{name}.again", f"{name}.values", **grid))
        replacements[name] = f"{name}.values"
    _write_nodes(graph, nodes)


def sink_dequantizers(graph: GraphProto) -> None:
    """Concatenates codes instead of values where all branches of a Concat are dequantized alike."""
    made_by = producers(graph.node)
    nodes = []
    for node in graph.node:
        sources = [made_by.get(name) for name in node.input]
        alike = node.op_type == "Concat" and all(source and source.op_type == "Dequantize" for source in sources)
        grids = [attributes(source) for source in sources] if alike else []
        if not alike or any(grid != grids[0] for grid in grids):
            nodes.append(node)
            continue
        codes = f"{node.output[0]}.codes"
        axis = attributes(node)["axis"]
        nodes.append(helper.make_node("Concat", [source.input[0] for source in sources], [codes], axis=axis))
        nodes.append(_dequantize(codes, node.output[0], **grids[0]))
    _write_nodes(graph, nodes)


def sink_through_transposes(graph: GraphProto) -> None:
    """Transposes and reshapes codes instead of values."""
    made_by = producers(graph.node)
    for node in list(graph.node):
        source = made_by.get(node.input[0]) if node.op_type in ("Transpose", "Reshape") else None
        if source is None or source.op_type != "Dequantize":
            continue
        values, codes = node.output[0], f"{node.output[0]}.codes"
        node.input[0], node.output[0] = source.input[0], codes
        moved = _dequantize(codes, values, **attributes(source))
        position = next(index for index, other in enumerate(graph.node) if other.output[:1] == [codes])
        graph.node.insert(position + 1, moved)
        made_by[values] = moved


def _moved_in_front(node: NodeProto, source: NodeProto) -> list[NodeProto] | None:
    """Returns what replaces ``source -> Quantize node`` when quantizing goes first, or None where it must not."""
    moved = copy.deepcopy(source)
    if source.op_type == "Concat":
        positions = range(len(source.input))
    elif source.op_type in _COMMUTE_WITH_QUANTIZE and len(source.output) == 1:
        if source.op_type == "Resize" and attributes(source).get("mode", "nearest") != "nearest":
            return None
        positions = range(1)
    else:
        return None
    new_nodes, codes = [], node.output[0]
    for position in positions:
        branch = f"{codes}.{position}"
        new_nodes.append(_quantize(source.input[position], branch, attributes(node)))
        moved.input[position] = branch
    moved.output[0] = codes
    return [*new_nodes, moved]


def hoist_quantizers(graph: GraphProto) -> None:
    """Moves Quantize in front of Concat, MaxPool, nearest Resize and Slice, as far up as it goes."""
    changed = True
    while changed:
        changed, nodes, made_by = False, [], producers(graph.node)
        for node in graph.node:
            source = made_by.get(node.input[0]) if node.op_type == "Quantize" else None
            replacement = _moved_in_front(node, source) if source is not None else None
            nodes.extend([node] if replacement is None else replacement)
            changed |= replacement is not None
        _write_nodes(graph, nodes)


def keep_biases_float(graph: GraphProto) -> None:
    """Keeps onnxruntime from rounding biases that the network does not round, by a Max that it cannot see through.

    It runs Dequantize -> Conv -> Quantize in integers, also across a Relu or Clip that the quantizer's range makes
    superfluous, and rounds a float bias to steps of input times weight. In a 4-bit network of four convolutions that
    changed 0.17 % of all codes with ReLU and 0.85 % without activation functions (onnxruntime 1.31).
    (Under ``activation.output`` the bias is an integer already, and what is wanted is just that.)
    """
    made_by = producers(graph.node)
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}

    def only_reader(node: NodeProto) -> NodeProto | None:
        found = readers.get(node.output[0], [])
        return found[0] if len(found) == 1 and node.output[0] not in outputs else None

    behind: dict[str, list[NodeProto]] = {}  # convolution's result -> what is put behind it
    for node in graph.node:
        bias = made_by.get(node.input[2]) if node.op_type == "Conv" and len(node.input) > 2 else node
        reader = only_reader(node) if bias is None else None
        if reader is not None and reader.op_type in ("Relu", "Clip"):
            reader = only_reader(reader)
        if reader is not None and reader.op_type == "Quantize":
            name = node.output[0]
            behind[name] = [helper.make_node("Max", [f"{name}.raw", _LOWEST], [name])]
            node.output[0] = f"{name}.raw"
    if behind:
        graph.initializer.append(numpy_helper.from_array(np.asarray(np.finfo(np.float32).min), _LOWEST))
        raw = [[node, *behind.get(node.output[0].removesuffix(".raw"), [])] for node in graph.node]
        _write_nodes(graph, [node for nodes in raw for node in nodes])


def merge_duplicates(graph: GraphProto) -> dict[str, str]:
    """Keeps one of several nodes that compute the same from the same. Returns removed tensor -> kept tensor."""
    outputs = {value.name for value in graph.output}
    kept, seen, replacements = [], {}, {}
    for node in graph.node:
        inputs = tuple(replacements.get(name, name) for name in node.input)
        settings = tuple(
            sorted(item.SerializeToString(deterministic=True) for item in node.attribute if item.name != "module")
        )
        key = (node.domain, node.op_type, inputs, settings)
        if key in seen and not outputs & set(node.output):
            replacements.update(zip(node.output, seen[key].output, strict=True))
        else:
            seen.setdefault(key, node)
            kept.append(node)
    _write_nodes(graph, kept)
    _redirect(graph, replacements)
    return replacements


def remove_unused(graph: GraphProto) -> None:
    """Removes nodes and initialisers that no output depends on; initialisers end up in the order of their first use."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(node.input)
    _write_nodes(graph, kept[::-1])
    stored = {tensor.name: copy.deepcopy(tensor) for tensor in graph.initializer}
    used = dict.fromkeys(name for node in graph.node for name in node.input if name in stored)
    del graph.initializer[:]
    graph.initializer.extend(stored[name] for name in used)


# --- writing standard operators --------------------------------------------------------------------------------------


class _Lowering:
    """Collects standard nodes and the constants they need.

    Args:
        graph: takes the constants.
        clip_floats: codes of fewer than 8 bits are clipped in front of QuantizeLinear, as values, instead of behind it.
        packed_bits: weights of at most so many bits will be packed and must keep their small codes.
    """

    def __init__(self, graph: GraphProto, clip_floats: bool, packed_bits: int) -> None:
        self.graph, self.clip_floats, self.packed_bits = graph, clip_floats, packed_bits
        self.nodes: list[NodeProto] = []
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.multiplied: set[str] = set()
        self.constants = {tensor.name for tensor in graph.initializer}

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants.add(name)
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def code(self, value: int, signed: int) -> str:
        """A scalar code; equal ones are stored once."""
        kind = np.int8 if signed else np.uint8
        return self.constant(f"{kind.__name__}_{value}", kind(value))

    def scale(self, value: float) -> str:
        """A scale of its own for every node: a file with GABFusion then has as many constants as one without."""
        return self.constant(f"scale_{len(self.nodes)}", np.float32(value))

    def add(self, operator: str, inputs: Sequence[str], output: str, **settings) -> str:
        """Appends a node and returns its output."""
        self.nodes.append(helper.make_node(operator, inputs, [output], **settings))
        return output

    def quantize(self, node: NodeProto) -> None:
        grid = attributes(node)
        if grid.get("thresholds"):
            self.count(node.input[0], np.asarray(grid["thresholds"], np.float32), node.output[0])
        elif self.clip_floats:
            self.clip_and_quantize(node, grid)
        else:
            self.quantize_and_clip(node, grid)

    def count(self, x: str, thresholds: np.ndarray, output: str) -> None:
        """Writes the number of ``thresholds`` that are <= ``x`` into ``output``, as uint8 (see the file's top)."""
        levels = len(thresholds) + 1
        stride = 1  # how many levels one result of the comparisons stands for
        while -(-levels // stride) > _MOST_COMPARISONS + 1:
            stride *= 2
        padded = np.append(thresholds, np.full(-levels % stride, np.inf, np.float32))
        coarse = padded[stride - 1 :: stride]
        count = self.code(0, 0)
        for index, threshold in enumerate(coarse):
            last = stride == 1 and index == len(coarse) - 1
            passed = self.add("GreaterOrEqual", [x, self.threshold(threshold)], f"{output}.passed{index}")
            name = output if last else f"{output}.count{index}"
            count = self.add("Where", [passed, self.code(index + 1, 0), count], name)
        if stride > 1:
            count = self.add("Cast", [count], f"{output}.part{stride}", to=TensorProto.INT32)
        while stride > 1:  # count * stride thresholds are known to be <= x, and (count + 1) * stride known not to be
            middle = self.constant(f"thresholds_{len(self.nodes)}", padded[stride // 2 - 1 :: stride])
            stride //= 2
            name = f"{output}.part{stride}"
            border = self.add("Gather", [middle, count], f"{name}.border")
            passed = self.add("GreaterOrEqual", [x, border], f"{name}.passed")
            one = self.add("Cast", [passed], f"{name}.one", to=TensorProto.INT32)
            count = self.add("Add", [self.add("Add", [count, count], f"{name}.twice"), one], name)
            if stride == 1:
                self.add("Cast", [count], output, to=TensorProto.UINT8)

    def threshold(self, value: np.float32) -> str:
        return self.constant(f"scale_{len(self.nodes)}", value)

    def clip_and_quantize(self, node: NodeProto, grid: dict) -> None:
        """Clips values to the outermost levels, which round to the outermost codes."""
        signed, source = grid["signed"], node.input[0]
        zero_point, scale = self.code(grid["zero_point"], signed), self.scale(grid["step"])
        if (grid["low"], grid["high"]) != ((-128, 127) if signed else (0, 255)):
            limits = [np.float32(grid["step"]) * np.float32(grid[end] - grid["zero_point"]) for end in ("low", "high")]
            names = [self.constant(f"{scale}_{end}", limit) for end, limit in zip(("low", "high"), limits, strict=True)]
            source = self.add("Clip", [source, *names], f"{node.output[0]}.clipped")
        self.add("QuantizeLinear", [source, scale, zero_point], node.output[0])

    def quantize_and_clip(self, node: NodeProto, grid: dict) -> None:
        signed = grid["signed"]
        zero_point, scale = self.code(grid["zero_point"], signed), self.scale(grid["step"])
        if (grid["low"], grid["high"]) == ((-128, 127) if signed else (0, 255)):
            self.nodes.append(helper.make_node("QuantizeLinear", [node.input[0], scale, zero_point], node.output))
            return
        wide = f"{node.output[0]}.wide"
        limits = [self.code(grid["low"], signed), self.code(grid["high"], signed)]
        self.nodes.append(helper.make_node("QuantizeLinear", [node.input[0], scale, zero_point], [wide]))
        self.nodes.append(helper.make_node("Clip", [wide, *limits], node.output))

    def dequantize(self, node: NodeProto) -> None:
        grid = attributes(node)
        inputs = [node.input[0], self.scale(grid["step"]), self.code(grid["zero_point"], grid["signed"])]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, node.output))

    def weight(self, node: NodeProto) -> None:
        numbers = attributes(node)
        # Packed ones are computed with in float, where only the bias has to be a multiple of the finer unit.
        if numbers["bits"] > self.packed_bits and numbers["multiplier"] != 1:
            self.multiply(*node.input, np.int8(numbers["multiplier"]))
        self.nodes.append(helper.make_node("DequantizeLinear", node.input, node.output, axis=0))

    def multiply(self, codes: str, scale: str, multiplier: np.int8) -> None:
        """Multiplies stored codes by a power of two and divides their scale by it, once."""
        if codes not in self.multiplied:
            self.multiplied.add(codes)
            for name, change in ((codes, lambda v: v * multiplier), (scale, lambda v: v / np.float32(multiplier))):
                tensor = self.stored[name]
                tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def lower(graph: GraphProto, clip_floats: bool = False, packed_bits: int = 0) -> list[QuantizerNode]:
    """Writes standard operators for the private nodes. Returns where each quantizer is."""
    lowering = _Lowering(graph, clip_floats, packed_bits)
    write: dict[str, Callable[[NodeProto], None]] = {
        "Quantize": lowering.quantize,
        "Dequantize": lowering.dequantize,
        "IntegerWeight": lowering.weight,
    }
    places = []
    for node in graph.node:
        if node.op_type == "Quantize" and "module" in attributes(node):
            places.append(QuantizerNode(attributes(node)["module"], node.input[0], node.output[0]))
        write.get(node.op_type, lowering.nodes.append)(node)
    _write_nodes(graph, lowering.nodes)
    return places


def rename(graph: GraphProto) -> dict[str, str]:
    """Gives nodes and tensors short names that do not depend on the path they were traced on. Returns old -> new.

    Parameters keep the name they have in the network, and a convolution is called as the module it was. Everything
    else is numbered: the length of a name must not tell whether there was a GABFusion node around.
    """
    kept = {value.name for value in [*graph.input, *graph.output]}
    names = {}
    for index, tensor in enumerate(graph.initializer):
        traced = tensor.name.startswith(("/", "onnx::", "scale_", "thresholds_")) or "_output_" in tensor.name
        names[tensor.name] = f"constant_{index}" if traced else tensor.name
    for index, node in enumerate(graph.node):
        for number, name in enumerate(node.output):
            if name and name not in kept:
                names[name] = f"t{index}" if number == 0 else f"t{index}.{number}"
        node.name = f"{node.op_type}_{index}"
    made_by, taken = producers(graph.node), {}
    for node in graph.node:
        if node.op_type == "Conv":
            dequantize = made_by.get(node.input[1])
            weight = names[dequantize.input[0] if dequantize is not None else node.input[1]]
            node.name = weight.removesuffix(".weight")
            taken[node.name] = taken.get(node.name, 0) + 1
            if taken[node.name] > 1:  # a convolution that runs again, or weights that two share
                node.name += f".call{taken[node.name]}"
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    return names


def convert_opset(model: ModelProto, opset: int) -> ModelProto:
    """Returns the model in a newer (or the same) version of the standard operators.

    Raises:
        UserError: onnx knows no way to that version.
    """
    private = [entry for entry in model.opset_import if entry.domain == DOMAIN]
    for entry in private:
        model.opset_import.remove(entry)
    current = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if current == opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:
        raise UserError(f"--opset {opset}: onnx cannot convert the graph from {current} ({error}).") from error


def pack_int4(tensor: TensorProto) -> TensorProto:
    """Returns an int8 tensor with values in [-8, 7] as an INT4 one: two codes a byte, the first one in the low half."""
    codes = numpy_helper.to_array(tensor)
    if codes.dtype != np.int8 or codes.min(initial=0) < -8 or codes.max(initial=0) > 7:
        raise ValueError(f"{tensor.name}: not int8 codes between -8 and 7")
    halves = codes.reshape(-1).view(np.uint8) & 15
    halves = np.append(halves, np.uint8(0)) if halves.size % 2 else halves
    packed = halves[0::2] | (halves[1::2] << 4)
    return TensorProto(name=tensor.name, data_type=TensorProto.INT4, dims=codes.shape, raw_data=packed.tobytes())


def _pack_weights(graph: GraphProto, names: Iterable[str]) -> None:
    names = set(names)
    for tensor in graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(pack_int4(tensor))


def build(
    traced: ModelProto, opset: int = DEFAULT_OPSET, int4_weights: bool = False, target: str = "onnxruntime"
) -> ExportedGraph:
    """Runs all passes over a traced model and writes standard operators.

    Args:
        traced: from ``trace``; it is not changed.
        opset: version of the standard operators, at least 21 with ``int4_weights``.
        int4_weights: weights whose codes fit in 4 bits are stored as INT4 tensors, two codes a byte.
        target: ``onnxruntime``, or ``tensorrt``: nothing between QuantizeLinear and DequantizeLinear.

    Returns:
        The model, checked by onnx, and where the quantizers are in it.

    Raises:
        UserError: the opset is too old for what the graph needs, onnx cannot convert to it, or the target cannot run
            the graph.
    """
    model = copy.deepcopy(traced)
    graph = model.graph
    tidy(graph)
    quantized = any(node.domain == DOMAIN for node in graph.node)
    least = INT4_OPSET if int4_weights else LOWEST_QUANTIZED_OPSET
    if quantized and opset < least:
        raise UserError(f"--opset {opset} has no operators for these weights; pass --opset {least} or more.")
    if target != "tensorrt":
        hoist_factors(graph)
    codes = split_grids(graph)
    if target == "tensorrt":
        check_symmetric(graph)
        requantize_concats(graph)
    else:
        sink_dequantizers(graph)
        sink_through_transposes(graph)
        hoist_quantizers(graph)
    merged = merge_duplicates(graph)
    remove_unused(graph)
    if target == "onnxruntime":
        keep_biases_float(graph)
    narrow = [node.input[0] for node in graph.node if node.op_type == "IntegerWeight" and attributes(node)["bits"] <= 4]
    places = lower(graph, clip_floats=target == "tensorrt", packed_bits=4 if int4_weights else 0)
    remove_unused(graph)
    names = rename(graph)
    # Types of inner tensors are the tracer's; they are wrong since codes replaced values, and readers infer them.
    del graph.value_info[:]
    model = convert_opset(model, opset)
    if int4_weights:
        _pack_weights(model.graph, [names[name] for name in narrow])
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = "yolov5"
    onnx.checker.check_model(model, full_check=True)
    final = {module: names[merged.get(name, name)] for module, name in codes.items()}
    quantizers = [
        QuantizerNode(place.module, names.get(place.source, place.source), names[place.codes]) for place in places
    ]
    return ExportedGraph(model, final, quantizers)


def set_metadata(model: ModelProto, metadata: Mapping[str, str]) -> None:
    """Replaces the model's metadata."""
    del model.metadata_props[:]
    helper.set_model_props(model, dict(metadata))
