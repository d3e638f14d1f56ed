"""The passes of ``quant.onnx_graph`` on small graphs, judged by onnxruntime and by onnx's own helpers."""

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_detector import SIZE, images, quantized_detector

from quant import onnx_graph
from quant.fold import fold
from quant.verify import Verification
from utils.errors import UserError

GRID = {"step": 0.1, "output_step": 0.1, "zero_point": 3, "output_zero_point": 3, "low": 0, "high": 15}


def model_of(nodes, inputs, outputs, constants=(), opset=17):
    """A model of float tensors; ``inputs`` and ``outputs`` map names to shapes."""
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in d.items()] for d in (inputs, outputs)]
    initialisers = [numpy_helper.from_array(array, name) for name, array in constants]
    graph = helper.make_graph(nodes, "test", *values, initialisers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(onnx_graph.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def grid_node(source, output, module="layer", **changes):
    return helper.make_node(
        "ActivationGrid", [source], [output], domain=onnx_graph.DOMAIN, module=module, **{**GRID, **changes}
    )


def grid_values(x, step=0.1, output_step=0.1, zero_point=3, low=0, high=15):
    """The definition, in float32 as both runtimes compute it."""
    codes = np.clip(np.round(x / np.float32(step)) + zero_point, low, high)
    return (codes - zero_point).astype(np.float32) * np.float32(output_step)


def run(model, **feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def operators(model):
    return collections.Counter(node.op_type for node in model.graph.node)


def tensor_types(model):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(scale=0.7, size=shape).astype(np.float32)


def pool(source, output):
    return helper.make_node("MaxPool", [source], [output], kernel_shape=[5, 5], pads=[2, 2, 2, 2], strides=[1, 1])


@pytest.mark.parametrize(
    ("low", "high", "zero_point"), [(0, 15, 3), (0, 3, 1), (0, 255, 40), (-7, 7, 0), (-128, 127, 0)]
)
def test_grid_becomes_quantize_clip_dequantize(low, high, zero_point):
    limits = {"low": low, "high": high, "zero_point": zero_point}
    node = grid_node("x", "y", **limits, output_zero_point=zero_point)
    built = onnx_graph.build(model_of([node], {"x": [2, 50]}, {"y": [2, 50]}))
    x = noise(2, 50) * 8
    np.testing.assert_array_equal(run(built.model, x=x), grid_values(x, **limits))
    wide = (low, high) in ((0, 255), (-128, 127))
    assert operators(built.model) == {"QuantizeLinear": 1, "DequantizeLinear": 1} | ({} if wide else {"Clip": 1})


def test_quantizing_moves_in_front_of_pool_and_concat_and_is_done_once():
    nodes = [pool("x", "a"), pool("a", "b"), helper.make_node("Concat", ["x", "a", "b"], ["c"], axis=1)]
    nodes.append(grid_node("c", "y"))
    built = onnx_graph.build(model_of(nodes, {"x": [1, 3, 9, 9]}, {"y": [1, 9, 9, 9]}))
    assert operators(built.model) == {"QuantizeLinear": 1, "Clip": 1, "MaxPool": 2, "Concat": 1, "DequantizeLinear": 1}
    types = tensor_types(built.model)
    moved = [node for node in built.model.graph.node if node.op_type in ("MaxPool", "Concat")]
    assert all(types[node.output[0]] == TensorProto.UINT8 for node in moved)
    x = torch.from_numpy(noise(1, 3, 9, 9))
    first = torch.nn.functional.max_pool2d(x, 5, 1, 2)
    joined = torch.cat([x, first, torch.nn.functional.max_pool2d(first, 5, 1, 2)], 1)
    np.testing.assert_array_equal(run(built.model, x=x.numpy()), grid_values(joined.numpy()))
    assert built.codes["layer"] == next(node.output[0] for node in moved if node.op_type == "Concat")


@pytest.mark.parametrize(("mode", "moves"), [("nearest", True), ("linear", False)])
def test_only_a_nearest_resize_commutes(mode, moves):
    attributes = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
    attributes |= {"nearest_mode": "floor"} if mode == "nearest" else {}
    scales = ("scales", np.array([1, 1, 2, 2], np.float32))
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["r"], **attributes), grid_node("r", "y")]
    built = onnx_graph.build(model_of(nodes, {"x": [1, 2, 4, 4]}, {"y": [1, 2, 8, 8]}, [scales]))
    order = [node.op_type for node in built.model.graph.node]
    assert (order.index("QuantizeLinear") < order.index("Resize")) == moves
    x = noise(1, 2, 4, 4)
    resized = torch.nn.functional.interpolate(torch.from_numpy(x), scale_factor=2).numpy()
    if moves:
        np.testing.assert_array_equal(run(built.model, x=x), grid_values(resized))


def test_branches_with_their_own_steps_are_concatenated_as_codes():
    steps = (0.08, 0.13)
    nodes = [grid_node(name, f"q{name}", f"grid {name}", step=step) for name, step in zip("ab", steps, strict=True)]
    nodes.append(helper.make_node("Concat", ["qa", "qb"], ["y"], axis=1))
    shape = {"a": [1, 2, 3, 3], "b": [1, 1, 3, 3]}
    built = onnx_graph.build(model_of(nodes, shape, {"y": [1, 3, 3, 3]}))
    assert operators(built.model) == {"QuantizeLinear": 2, "Clip": 2, "Concat": 1, "DequantizeLinear": 1}
    a, b = noise(1, 2, 3, 3), noise(1, 1, 3, 3, seed=1)
    expected = [grid_values(x, step=step) for x, step in zip((a, b), steps, strict=True)]
    np.testing.assert_array_equal(run(built.model, a=a, b=b), np.concatenate(expected, 1))
    assert sorted(built.codes) == ["grid a", "grid b"]


@pytest.mark.parametrize("change", [{"output_step": 0.2}, {"output_zero_point": 4}])
def test_branches_of_different_value_stay_apart(change):
    nodes = [grid_node("a", "qa"), grid_node("b", "qb", **change)]
    nodes.append(helper.make_node("Concat", ["qa", "qb"], ["y"], axis=1))
    built = onnx_graph.build(model_of(nodes, {"a": [1, 2], "b": [1, 2]}, {"y": [1, 4]}))
    assert operators(built.model)["DequantizeLinear"] == 2


def test_equal_grids_of_one_tensor_are_merged_and_both_layers_find_their_codes():
    nodes = [grid_node("x", "p", "first"), grid_node("x", "q", "second"), helper.make_node("Add", ["p", "q"], ["y"])]
    built = onnx_graph.build(model_of(nodes, {"x": [8]}, {"y": [8]}))
    assert operators(built.model) == {"QuantizeLinear": 1, "Clip": 1, "DequantizeLinear": 1, "Add": 1}
    assert built.codes["first"] == built.codes["second"]
    x = noise(8)
    np.testing.assert_array_equal(run(built.model, x=x), 2 * grid_values(x))


def uneven_thresholds(count, seed=0):
    """Non-decreasing; the third and fourth are equal, so that one code never occurs."""
    thresholds = np.sort(np.random.default_rng(seed).normal(size=count)).astype(np.float32)
    thresholds[3:4] = thresholds[2]
    return thresholds


def around(thresholds):
    """Every threshold, its two neighbours in float32, what lies far outside, and some noise."""
    below, above = (np.nextafter(thresholds, np.float32(end)) for end in (-np.inf, np.inf))
    far = np.float32([-1e30, 1e30, 0, -0.0])
    return np.concatenate([thresholds, below, above, far, noise(50) * 3])


def threshold_values(x, thresholds, step, zero_point):
    counts = np.array([sum(bool(value >= t) for t in thresholds) for value in x.reshape(-1)]).reshape(x.shape)
    return (counts - zero_point).astype(np.float32) * np.float32(step)


@pytest.mark.parametrize("count", [3, 7, 15, 31, 32, 63, 200, 255])
def test_thresholds_are_counted_exactly(count):
    thresholds = uneven_thresholds(count)
    x = around(thresholds)
    node = grid_node("x", "y", low=0, high=count, output_zero_point=2, zero_point=2, thresholds=thresholds.tolist())
    built = onnx_graph.build(model_of([node], {"x": list(x.shape)}, {"y": list(x.shape)}))
    np.testing.assert_array_equal(run(built.model, x=x), threshold_values(x, thresholds, 0.1, 2))
    assert ("Gather" in operators(built.model)) == (count > 31)


def test_thresholds_are_counted_in_front_of_pool_resize_and_concat_and_once():
    thresholds = uneven_thresholds(15)
    scales = ("scales", np.array([1, 1, 2, 2], np.float32))
    resize = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        pool("x", "a"),
        helper.make_node("Concat", ["x", "a"], ["c"], axis=1),
        helper.make_node("Resize", ["c", "", "scales"], ["r"], **resize),
        grid_node("r", "y", thresholds=thresholds.tolist()),
    ]
    built = onnx_graph.build(model_of(nodes, {"x": [1, 3, 9, 9]}, {"y": [1, 6, 18, 18]}, [scales]))
    assert operators(built.model)["GreaterOrEqual"] == 15, "the tensor is counted once"
    types = tensor_types(built.model)
    moved = [node for node in built.model.graph.node if node.op_type in ("MaxPool", "Concat", "Resize")]
    assert all(types[node.output[0]] == TensorProto.UINT8 for node in moved)
    x = torch.from_numpy(noise(1, 3, 9, 9))
    joined = torch.cat([x, torch.nn.functional.max_pool2d(x, 5, 1, 2)], 1)
    wanted = threshold_values(torch.nn.functional.interpolate(joined, scale_factor=2).numpy(), thresholds, 0.1, 3)
    np.testing.assert_array_equal(run(built.model, x=x.numpy()), wanted)


def test_equal_grids_with_different_thresholds_are_not_merged():
    thresholds = uneven_thresholds(15).tolist()
    changed = [*thresholds[:-1], thresholds[-1] + 1]
    nodes = [grid_node("x", name, name, thresholds=t) for name, t in (("p", thresholds), ("q", changed))]
    nodes.append(helper.make_node("Sub", ["p", "q"], ["y"]))
    built = onnx_graph.build(model_of(nodes, {"x": [1]}, {"y": [1]}))
    assert run(built.model, x=np.float32([thresholds[-1] + 0.5])) == pytest.approx(0.1)


def test_for_tensorrt_every_code_is_int8_with_zero_point_zero_and_dequantized_at_once():
    grid = {"low": -8, "high": 7, "zero_point": 0, "output_zero_point": 0}
    nodes = [pool("x", "a"), helper.make_node("Concat", ["x", "a"], ["c"], axis=1), grid_node("c", "y", **grid)]
    built = onnx_graph.build(model_of(nodes, {"x": [1, 3, 9, 9]}, {"y": [1, 6, 9, 9]}), target="tensorrt")
    order = [node.op_type for node in built.model.graph.node]
    assert order == ["MaxPool", "Concat", "Clip", "QuantizeLinear", "DequantizeLinear"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in built.model.graph.initializer}
    for node in built.model.graph.node[-2:]:
        assert constants[node.input[2]].dtype == np.int8 and constants[node.input[2]] == 0
    x = torch.from_numpy(noise(1, 3, 9, 9))
    joined = torch.cat([x, torch.nn.functional.max_pool2d(x, 5, 1, 2)], 1).numpy()
    np.testing.assert_array_equal(run(built.model, x=x.numpy()), grid_values(joined, zero_point=0, low=-8, high=7))


@pytest.mark.parametrize("change", [{"zero_point": 1}, {"low": 0}, {"thresholds": [0.0, 1.0]}])
def test_what_tensorrt_cannot_run_is_refused(change):
    grid = {"low": -8, "high": 7, "zero_point": 0, "output_zero_point": 0} | change
    with pytest.raises(UserError, match="layer: TensorRT runs int8 codes with zero point 0 only"):
        onnx_graph.build(model_of([grid_node("x", "y", **grid)], {"x": [1]}, {"y": [1]}), target="tensorrt")


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (3, 1, 1, 1)])
def test_int4_packing_is_onnx_own(shape):
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    packed = onnx_graph.pack_int4(numpy_helper.from_array(codes, "w"))
    ours = onnx_graph.pack_int4(numpy_helper.from_array(codes, "w"))
    theirs = helper.make_tensor("w", TensorProto.INT4, shape, codes.reshape(-1).tolist())
    np.testing.assert_array_equal(numpy_helper.to_array(packed).astype(np.int8), codes)
    np.testing.assert_array_equal(numpy_helper.to_array(theirs).astype(np.int8), codes)
    assert len(ours.raw_data) == -(-codes.size // 2)


def test_int4_packing_refuses_wider_codes():
    with pytest.raises(ValueError, match="between -8 and 7"):
        onnx_graph.pack_int4(numpy_helper.from_array(np.array([8], np.int8), "w"))


def test_codes_that_no_byte_holds_are_refused():
    with pytest.raises(UserError, match="layer: codes 0 to 511"):
        onnx_graph.build(model_of([grid_node("x", "y", high=511)], {"x": [1]}, {"y": [1]}))


def test_an_opset_without_the_operators_is_refused():
    model = model_of([grid_node("x", "y")], {"x": [1]}, {"y": [1]})
    with pytest.raises(UserError, match="--opset 13 or more"):
        onnx_graph.build(model, opset=12)
    with pytest.raises(UserError, match="--opset 21 or more"):
        onnx_graph.build(model, opset=17, int4_weights=True)
    with pytest.raises(UserError, match="--opset 900"):
        onnx_graph.build(model, opset=900)


@pytest.mark.parametrize(("bits", "opset"), [(4, 13), (4, 17), (4, 21), (2, 17), (8, 17)])
def test_a_network_is_the_same_in_every_opset(bits, opset):
    folded = fold(quantized_detector(bits))
    folded.model[-1].export = True
    batch = images(1)
    built = onnx_graph.build(
        onnx_graph.trace(onnx_graph.traceable(folded), torch.zeros(1, 3, SIZE, SIZE), opset), opset
    )
    assert {entry.domain: entry.version for entry in built.model.opset_import} == {"": opset}
    with torch.no_grad():
        expected = folded(batch)
    np.testing.assert_allclose(run(built.model, images=batch.numpy()), expected.numpy(), rtol=1e-3, atol=1e-3)


def test_the_traced_copy_leaves_the_network_alone_and_the_file_is_always_the_same():
    folded = fold(quantized_detector(4, gabfusion=True))
    folded.model[-1].export = True
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    kinds = [type(module) for module in folded.modules()]
    contents = []
    for _ in range(2):
        traced = onnx_graph.trace(onnx_graph.traceable(folded), torch.zeros(1, 3, SIZE, SIZE))
        contents += [onnx_graph.build(traced).model.SerializeToString(deterministic=True) for _ in range(2)]
    assert len(set(contents)) == 1
    assert kinds == [type(module) for module in folded.modules()]
    assert all(torch.equal(before[name], value) for name, value in folded.state_dict().items())


def test_a_difference_that_was_not_measured_is_not_called_zero():
    assert "largest difference 0 (images" in Verification(images=1, without_flip=1).table()
    assert "a flipped code in every image" in Verification(images=1).table()
