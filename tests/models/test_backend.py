"""One face for checkpoints and ONNX files: the same boxes from each, and clear refusals."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from small_detector import NAMES, SIZE, float_detector, images, quantized_detector, save

import export
from models.backend import load_backend, load_network
from models.yolo import DetectionModel
from utils.errors import UserError


def export_file(path, *flags):
    assert export.main(["--weights", str(path), *map(str, flags)]) == 0
    return path.with_suffix(".onnx")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(float_detector(), tmp_path_factory.mktemp("float") / "best.pt")


@pytest.fixture(scope="module")
def dynamic_file(checkpoint, tmp_path_factory):
    path = save(float_detector(), tmp_path_factory.mktemp("dynamic") / "best.pt")
    return export_file(path, "--dynamic")


@pytest.fixture(scope="module")
def batch_of_two(tmp_path_factory):
    path = save(float_detector(), tmp_path_factory.mktemp("fixed") / "best.pt")
    return export_file(path, "--batch-size", 2, "--imgsz", SIZE, 96)


def expected(batch):
    model = float_detector()
    with torch.no_grad():
        return model(batch)[0]


def plain_model(path, metadata=(), columns=8):
    """A stand-in for a file of another tool: one node, the right shapes."""
    shape = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", columns])]
    output = [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["n", "h", columns])]
    nodes = [helper.make_node("ReduceMax", ["images"], ["output0"], axes=[1], keepdims=0)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", shape, output), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    helper.set_model_props(model, dict(metadata))
    onnx.save_model(model, str(path))
    return path


def test_a_checkpoint_is_fused_and_returns_raw_maps(checkpoint):
    backend = load_backend(checkpoint, torch.device("cpu"))
    batch = images(2)
    decoded, raw = backend(batch)
    torch.testing.assert_close(decoded, expected(batch), rtol=1e-4, atol=1e-4)
    assert [tuple(level.shape) for level in raw] == [(2, 3, 8, 8, 8), (2, 3, 4, 4, 8)]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backend.model.modules())
    assert (backend.is_pt, backend.stride, backend.names, backend.nc) == (True, 16, NAMES, 3)
    assert backend.fixed_batch is None and backend.fixed_size is None


@pytest.mark.parametrize("shape", [(1, SIZE, SIZE), (3, 96, SIZE), (2, 32, 128)])
def test_a_dynamic_file_takes_any_batch_and_size(dynamic_file, shape):
    backend = load_backend(dynamic_file, "cpu")
    assert (backend.fixed_batch, backend.fixed_size, backend.is_pt) == (None, None, False)
    batch = images(*shape)
    decoded, raw = backend(batch)
    torch.testing.assert_close(decoded, expected(batch), rtol=1e-4, atol=1e-4)
    assert raw is None
    assert (backend.stride, backend.names) == (16, NAMES)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_fixed_batch_is_cut_and_filled(batch_of_two, count):
    backend = load_backend(batch_of_two, "cpu")
    assert (backend.fixed_batch, backend.fixed_size) == (2, (SIZE, 96))
    batch = images(count, SIZE, 96)
    torch.testing.assert_close(backend(batch)[0], expected(batch), rtol=1e-4, atol=1e-4)
    backend.warm_up((640, 640))


def test_a_wrong_size_says_what_to_pass(batch_of_two, dynamic_file, checkpoint):
    with pytest.raises(UserError, match=r"takes images of 64x96 pixels and got 64x64: pass --imgsz 64 96"):
        load_backend(batch_of_two, "cpu")(images(1))
    for path in (dynamic_file, checkpoint):
        with pytest.raises(UserError, match="multiples of 16, got 64x72"):
            load_backend(path, "cpu")(images(1, SIZE, 72))


def test_a_quantized_checkpoint_computes_as_in_training(tmp_path):
    model = quantized_detector(4, gabfusion=True)
    path = save(model, tmp_path / "best.pt")
    batch = images(2)
    # As in the backend: on some processors the two memory formats have different convolutions, whose sums round apart.
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        before = model(batch)[0]
    torch.testing.assert_close(load_backend(path, "cpu")(batch)[0], before, rtol=1e-4, atol=1e-3)
    network, weights = load_network(path)
    assert weights.quantization["weight"]["bits"] == 4
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_metadata_is_data_not_code(tmp_path):
    trap = tmp_path / "ran"
    names = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    backend = load_backend(plain_model(tmp_path / "m.onnx", {"names": names, "stride": "x"}), "cpu")
    assert not trap.exists()
    assert backend.names == {0: "class0", 1: "class1", 2: "class2"}
    assert backend.stride == 32


@pytest.mark.parametrize("text", ["{0: 'a', 1: 'b'}", '{"0": "a", "1": "b"}', "['a', 'b']"])
def test_names_are_read_in_every_usual_form(tmp_path, text):
    path = plain_model(tmp_path / "m.onnx", {"names": text, "stride": "8"}, columns=7)
    backend = load_backend(path, "cpu")
    assert (backend.names, backend.stride) == ({0: "a", 1: "b"}, 8)


def test_names_come_from_the_data_set_where_the_file_has_none(tmp_path):
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
    data = tmp_path / "data.yaml"
    data.write_text("path: .\ntrain: train\nval: val\nnames: [cat, dog, owl]\n")
    assert load_backend(plain_model(tmp_path / "m.onnx"), "cpu", data=data).names == {0: "cat", 1: "dog", 2: "owl"}
    with pytest.raises(UserError, match="give a data set YAML with --data"):
        load_backend(plain_model(tmp_path / "n.onnx", columns="columns"), "cpu")


def test_files_that_are_not_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_backend(tmp_path / "absent.onnx", "cpu")
    for name, reason in (("m.txt", "'.txt' files are not supported"), ("m.onnx", "onnxruntime cannot load it")):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=reason):
            load_backend(tmp_path / name, "cpu")


def test_an_onnx_file_with_other_inputs_is_refused(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "ab"]
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "g", value[:1], value[1:])
    path = tmp_path / "other.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    with pytest.raises(UserError, match="expected one input"):
        load_backend(path, "cpu")


def test_a_head_of_smaller_strides_than_the_backbones(tmp_path):
    """yolov5-p34's levels have the strides 8 and 16, its backbone goes down to 32, and so must the sides of images."""
    torch.manual_seed(0)
    path = save(DetectionModel("yolov5-p34.yaml", nc=3), tmp_path / "p34.pt")
    backend = load_backend(path, torch.device("cpu"))
    assert backend.stride == 32
    assert backend(images(1, 64, 96))[0].shape == (1, 3 * (8 * 12 + 4 * 6), 8)
    with pytest.raises(UserError, match="multiples of 32"):
        backend(images(1, 64, 80))
    file = load_backend(export_file(path, "--imgsz", 80), torch.device("cpu"))
    assert file.fixed_size == (96, 96) and file.stride == 32
