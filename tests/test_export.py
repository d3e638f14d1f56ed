"""``export.py`` from checkpoint to file: what is in the graph, what it computes, what is refused."""

import collections
import json
import shlex

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_detector import NAMES, SIZE, float_detector, images, quantized_detector, save

import export
from exporting.onnx_files import write_verified
from quant.fold import ActivationGrid, IntegerConv2d, fold
from quant.onnx_graph import build, trace, traceable
from quant.verify import outputs_agree, references, verify
from utils.errors import UserError

FORBIDDEN = {"BatchNormalization", "LayerNormalization", "ReduceMean", "InstanceNormalization", "Identity", "Constant"}


def run_export(path, *flags):
    code = export.main(["--weights", str(path), "--include", "onnx", *map(str, flags)])
    return code, path.with_suffix(".onnx"), path.with_name(f"{path.stem}_storage.onnx")


def run_file(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["output0"], {"images": batch.numpy()})[0])


def operators(path):
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def shape_of(value):
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Speed and storage file of the small detector at 4 bit, without and with GABFusion."""
    files = {}
    for gabfusion in (False, True):
        path = save(quantized_detector(4, gabfusion), tmp_path_factory.mktemp("q") / "best.pt")
        code, *files[gabfusion] = run_export(path)
        assert code == 0
    return files


@pytest.mark.parametrize("dynamic", [False, True])
def test_yolov5n_in_float(tmp_path, dynamic):
    model = float_detector("yolov5n.yaml")
    path = save(model, tmp_path / "yolov5n.pt", imgsz=64)
    code, file, storage = run_export(path, *(["--dynamic"] if dynamic else []))
    assert code == 0 and not storage.exists()
    content = onnx.load(str(file))
    assert not FORBIDDEN & set(operators(file))
    batch = images(2, 96, 64) if dynamic else images(1)
    with torch.no_grad():
        torch.testing.assert_close(run_file(file, batch), model(batch)[0], rtol=1e-4, atol=1e-4)
    shapes = [shape_of(content.graph.input[0]), shape_of(content.graph.output[0])]
    fixed = [[1, 3, 64, 64], [1, 252, 85]]
    assert shapes == ([["batch", 3, "height", "width"], ["batch", "anchors", 85]] if dynamic else fixed)
    if not dynamic:
        assert not {"Shape", "Gather", "Range"} & set(operators(file)), "shapes of a fixed size are constants"


@pytest.mark.parametrize("flags", [["--imgsz", "320", "--data", "coco-slice"], ["--imgsz", "160", "--half"]])
def test_official_weights(shared_data, tmp_path, flags):
    official = tmp_path / "yolov5n.pt"
    official.write_bytes((shared_data / "weights" / "yolov5n.pt").read_bytes())
    data = shared_data / "coco-slice" / "coco-slice.yaml"
    code, file, _ = run_export(official, *(str(data) if flag == "coco-slice" else flag for flag in flags))
    assert code == 0
    metadata = {entry.key: entry.value for entry in onnx.load(str(file)).metadata_props}
    assert metadata["stride"] == "32" and "'person'" in metadata["names"]


def test_half_precision_stays_close(tmp_path):
    model = float_detector()
    code, file, _ = run_export(save(model, tmp_path / "best.pt"), "--half")
    assert code == 0
    weights = [tensor for tensor in onnx.load(str(file)).graph.initializer if tensor.name.endswith(".weight")]
    assert weights and all(tensor.data_type == TensorProto.FLOAT16 for tensor in weights)
    batch = images(1)
    with torch.no_grad():
        expected = model(batch)[0]
    difference = (run_file(file, batch.half()).float() - expected).norm() / expected.norm()
    assert difference < 0.01


def test_16_bit_outputs_are_judged_by_the_image_and_nan_never_agrees():
    model = float_detector()
    with torch.no_grad():
        rows = model(images(1))[0]
    one_box = rows.clone()
    one_box[0, 0, 2] *= 1.1
    assert outputs_agree(rows, one_box, half=True) and not outputs_agree(rows, one_box)
    scores = rows.clone()
    scores[..., 4:] *= 1.05
    assert not outputs_agree(rows, scores, half=True), "scores are judged apart from pixels, which are far larger"
    for half in (False, True):
        assert outputs_agree(rows, rows, half) and not outputs_agree(rows, rows.clone().fill_(torch.nan), half)


@pytest.mark.parametrize("opset", [12, 21])
def test_float_in_other_opsets(tmp_path, opset):
    model = float_detector()
    code, file, _ = run_export(save(model, tmp_path / "best.pt"), "--opset", opset)
    assert code == 0
    assert onnx.load(str(file)).opset_import[0].version == opset
    batch = images(1)
    with torch.no_grad():
        torch.testing.assert_close(run_file(file, batch), model(batch)[0], rtol=1e-4, atol=1e-4)


def test_metadata(exported):
    for file in exported[True]:
        metadata = {entry.key: entry.value for entry in onnx.load(str(file)).metadata_props}
        assert metadata["stride"] == "16" and metadata["names"] == str(NAMES) and metadata["method"] == "lsq"
        assert json.loads(metadata["bits"]) == {"weights": 4, "activations": 4, "first_layer": 8, "detect": 8}


@pytest.mark.parametrize("gabfusion", [False, True])
def test_both_files_compute_what_the_trained_network_computes(exported, gabfusion):
    model = quantized_detector(4, gabfusion)
    batch = images(4)
    with torch.no_grad():
        expected = model(batch)[0]
    for file in exported[gabfusion]:
        ours = torch.cat([run_file(file, image[None]) for image in batch])
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_nothing_of_gabfusion_is_left(exported):
    plain, fused = exported[False], exported[True]
    for without, with_fusion in zip(plain, fused, strict=True):
        assert operators(without) == operators(with_fusion)
        assert without.stat().st_size == with_fusion.stat().st_size
        assert not FORBIDDEN & set(operators(with_fusion))
        scales = [
            {tensor.name: tensor.raw_data for tensor in onnx.load(str(file)).graph.initializer}
            for file in (without, with_fusion)
        ]
        assert scales[0].keys() == scales[1].keys() and scales[0] != scales[1]


def test_multiplications_are_those_of_the_float_network(exported, tmp_path):
    _, file, _ = run_export(save(float_detector(), tmp_path / "best.pt"))
    graph = onnx.load(str(exported[True][1])).graph
    factors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 3 and tensor.dims[1:] == [1, 1]}
    equalizing = sum(node.op_type == "Mul" and node.input[1] in factors for node in graph.node)
    assert equalizing > 20
    for operator in ("Mul", "Add", "Conv", "Sigmoid"):
        more = equalizing if operator == "Mul" else 0
        assert operators(exported[True][1]).count(operator) - more == operators(file).count(operator)
    speed, plain = operators(exported[True][0]), operators(file)
    assert speed.count("Conv") == plain.count("Conv") - 2 and speed.count("MatMul") == 2 * 3  # levels, anchors


@pytest.mark.parametrize("gabfusion", [False, True])
def test_concat_resize_and_pooling_move_single_bytes(exported, gabfusion):
    model = onnx.shape_inference.infer_shapes(onnx.load(str(exported[gabfusion][0])), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    wanted = {"Resize": 1, "MaxPool": 3, "Concat": 2 + 4 + 1}  # neck, C3s, SPPF; Detect's own stay float
    moved = collections.Counter(
        node.op_type for node in model.graph.node if types.get(node.output[0]) == TensorProto.UINT8
    )
    assert {name: moved[name] for name in wanted} == wanted
    made_by = {name: node for node in model.graph.node for name in node.output}
    readers = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(made_by[name].op_type == "DequantizeLinear" for node in readers for name in node.input[:2])


def test_weights_are_the_folded_codes(exported):
    folded = fold(quantized_detector(4, gabfusion=True))
    speed, storage = (
        {tensor.name: tensor for tensor in onnx.load(str(file)).graph.initializer} for file in exported[True]
    )
    convolutions = {name: module for name, module in folded.named_modules() if isinstance(module, IntegerConv2d)}
    assert len(convolutions) > 20
    for name, module in convolutions.items():
        narrow = TensorProto.INT4 if module.weight_bits <= 4 else TensorProto.INT8
        # The speed file's head multiplies by each anchor's rows on their own.
        parts = [speed[key] for key in speed if key == f"{name}.weight" or key.startswith(f"{name}.products.")]
        parts = [tensor for tensor in parts if tensor.name.endswith(".weight")]
        packed = storage[f"{name}.weight"]
        assert {tensor.data_type for tensor in parts} == {TensorProto.INT8} and packed.data_type == narrow
        rows = np.concatenate([numpy_helper.to_array(tensor) for tensor in parts]).reshape(module.weight_codes.shape)
        for codes in (rows, numpy_helper.to_array(packed).astype(np.int8)):
            np.testing.assert_array_equal(codes, module.weight_codes.numpy())


def test_verification_sees_every_kind_of_damage():
    folded = fold(quantized_detector(4))
    folded.model[-1].export = True
    expected = references(folded, images(2), trained=quantized_detector(4))
    traced = trace(traceable(folded), torch.zeros(1, 3, SIZE, SIZE))
    good = verify(folded, build(traced), expected)
    assert good.holds and good.quantizers.compared > 1000 and good.layers.compared > 1000, good.table()

    def damaged(pick, change):
        exported = build(traced)
        tensors = [tensor for tensor in exported.model.graph.initializer if pick(tensor)]
        tensor = tensors[len(tensors) // 2]
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
        return verify(folded, exported, expected)

    scales = {node.input[1] for node in build(traced).model.graph.node if node.op_type == "QuantizeLinear"}
    step = damaged(lambda tensor: tensor.name in scales, lambda scale: scale * np.float32(1.01))
    assert step.quantizers.unexplained and step.layers.unexplained and not step.holds
    weight = damaged(lambda tensor: tensor.name.endswith("cv1.conv.weight"), lambda codes: np.roll(codes, 1, 0))
    assert weight.layers.unexplained and not weight.quantizers.unexplained and not weight.holds
    bias = damaged(lambda tensor: tensor.name == "model.14.m.0.bias", lambda bias: bias + np.float32(0.1))
    assert not bias.holds and not bias.layers.unexplained
    assert "PROBLEM" in bias.table()


def test_a_file_that_does_not_hold_is_not_kept(tmp_path):
    folded = fold(quantized_detector(4))
    folded.model[-1].export = True
    exported = build(trace(traceable(folded), torch.zeros(1, 3, SIZE, SIZE)))
    grid = next(module for module in folded.modules() if isinstance(module, ActivationGrid))
    grid.step.mul_(1.5)
    target = tmp_path / "best.onnx"
    target.write_bytes(b"what was there")
    with pytest.raises(UserError, match="not written, it does not compute"):
        write_verified(exported, target, folded, references(folded, images(1)))
    assert target.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [target]


def test_one_run_writes_the_same_bytes_as_the_next(exported, tmp_path):
    path = save(quantized_detector(4, True), tmp_path / "best.pt")
    _, *again = run_export(path)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in exported[True]]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--include", "tflite"], "--include tflite: not a format"),
        (["--opset", "7"], "at least 12"),
        (["--batch", "0"], "must be 1 or more"),
        (["--img", "64", "64", "64"], "one side, or height and width"),
        (["--half"], "--half is for float models"),
        (["--opset", "12"], "pass --opset 13"),
        (["--data", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, flags, reason):
    path = save(quantized_detector(4), tmp_path / "best.pt")
    assert export.main(["--weights", str(path), *flags]) == 1
    assert reason in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_missing_weights_are_named(tmp_path, capsys):
    assert export.main(["--weights", str(tmp_path / "absent.pt")]) == 1
    assert "absent.pt does not exist" in capsys.readouterr().out


def test_size_is_rounded_up_to_the_stride(tmp_path, capsys):
    path = save(float_detector(), tmp_path / "best.pt")
    assert export.main(["--weights", str(path), "--img", "50", "64"]) == 0
    assert "exporting 64x64" in capsys.readouterr().out
    assert shape_of(onnx.load(str(path.with_suffix(".onnx"))).graph.input[0]) == [1, 3, 64, 64]


def test_the_commands_it_prints_can_be_pasted(tmp_path, capsys):
    (tmp_path / "two words").mkdir()
    path = save(float_detector(), tmp_path / "two words" / "best.pt")
    assert export.main(["--weights", str(path), "--img", "64"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Prove it:")]
    words = shlex.split(line)
    assert words[5:7] == [str(path), str(path.with_suffix(".onnx"))]


def test_an_oblong_file_gets_the_commands_that_take_it(tmp_path, capsys):
    path = save(float_detector(), tmp_path / "best.pt")
    assert export.main(["--weights", str(path), "--img", "32", "64"]) == 0
    printed = capsys.readouterr().out
    assert "--imgsz 32 64 --source" in printed and "python val.py" not in printed and "python export.py" not in printed
