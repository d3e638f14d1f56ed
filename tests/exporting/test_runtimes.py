"""The runtimes themselves: every format, in whatever reads it, finds what PyTorch finds."""

import ast
import json
import sys

import cv2
import numpy as np
import onnx
import pytest
import torch
import yaml
from exported_files import SIDE, files_of, run_export
from small_detector import (
    NAMES,
    TINY,
    confident,
    float_detector,
    folded_and_file,
    images,
    save,
    tiny_detector,
)

import detect
from models.backend import load_backend
from models.openvino_backend import in_openvino
from quant.registry import QUANTIZERS
from quant.verify import references, verify
from utils.errors import UserError


@pytest.fixture(scope="module")
def float_files(tmp_path_factory):
    """One network in every format, for batches of two."""
    path = save(confident(float_detector(TINY)), tmp_path_factory.mktemp("float") / "best.pt")
    run_export(path, "--include", "onnx", "openvino,torchscript", "--batch-size", 2)
    return files_of(path)


@pytest.fixture(scope="module")
def quantized_files(tmp_path_factory):
    path = save(tiny_detector("lsq", 4, gabfusion=True), tmp_path_factory.mktemp("quantized") / "best.pt")
    run_export(path, "--include", *("torchscript", "openvino", "onnx"))
    return [*files_of(path), path.with_name("best_storage.onnx")]


def decoded_by_torch(model, batch):
    with torch.no_grad():
        return model(batch)[0]


@pytest.mark.parametrize("number", range(3))
def test_every_runtime_finds_the_same_boxes(float_files, number):
    backend = load_backend(float_files[number])
    assert (backend.stride, backend.names, backend.is_pt, backend.suppression) == (4, NAMES, False, None)
    for count in (1, 2, 3):
        batch = images(count, SIDE, SIDE)
        decoded, raw = backend(batch)
        torch.testing.assert_close(
            decoded, decoded_by_torch(confident(float_detector(TINY)), batch), rtol=1e-4, atol=1e-4
        )
        assert raw is None
    backend.warm_up((SIDE, SIDE))


def test_opencv_finds_the_same_boxes(float_files):
    network = cv2.dnn.readNetFromONNX(str(float_files[0]))
    batch = images(2, SIDE, SIDE)
    network.setInput(batch.numpy())
    theirs = torch.from_numpy(network.forward())
    torch.testing.assert_close(theirs, decoded_by_torch(confident(float_detector(TINY)), batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(4))
def test_every_runtime_reads_a_quantized_network(quantized_files, number):
    backend = load_backend(quantized_files[number])
    batch = images(2, SIDE, SIDE)
    ours = decoded_by_torch(tiny_detector("lsq", 4, gabfusion=True), batch)
    # A flipped code may have changed some of the others; without one this is 1e-7.
    assert (backend(batch)[0] - ours).norm() / ours.norm() < 0.02
    assert backend.names == NAMES and backend.metadata["method"] == "lsq"


@pytest.mark.parametrize(("method", "bits"), [*((name, 4) for name in QUANTIZERS), ("lsq", 2), ("lsq", 8)])
def test_openvino_computes_the_codes_of_every_method(tmp_path, method, bits):
    model = tiny_detector(method, bits, gabfusion=bits != 8)
    folded, file = folded_and_file(model)
    onnx.save(file.model, str(tmp_path / "m.onnx"))
    expected = references(folded, list(images(1, SIDE, SIDE)), trained=model)
    result = verify(folded, file, expected, in_openvino(tmp_path / "m.onnx"))
    assert result.holds, result.table()
    assert result.layers.compared > 1000 and result.quantizers.unexplained == result.layers.unexplained == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_metadata_is_where_yolov5_looks(float_files):
    model = onnx.load(str(float_files[0]))
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert int(said["stride"]) == 4 and ast.literal_eval(said["names"]) == NAMES
    assert [model.graph.input[0].name, *(value.name for value in model.graph.output)] == ["images", "output0"]
    assert sorted(file.name for file in float_files[1].iterdir()) == ["best.bin", "best.xml", "best.yaml"]
    said = yaml.safe_load((float_files[1] / "best.yaml").read_text(encoding="utf-8"))
    assert said["stride"] == 4 and said["names"] == NAMES
    extra = {"config.txt": ""}
    torch.jit.load(str(float_files[2]), _extra_files=extra)
    said = json.loads(extra["config.txt"])
    assert said["stride"] == 4 and said["names"] == {str(key): name for key, name in NAMES.items()}
    assert said["shape"] == [2, 3, SIDE, SIDE]


def test_a_fixed_size_is_named(float_files):
    for file in float_files[:2]:
        with pytest.raises(UserError, match=r"takes images of 32x32 pixels and got 64x32"):
            load_backend(file)(images(1, 64, 32))


def test_a_size_that_does_not_apply_is_said(float_files, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((SIDE, SIDE, 3), np.uint8))
    flags = ["--weights", str(float_files[0]), "--source", str(tmp_path / "a.png"), "--project", str(tmp_path)]
    for size, said in (("64", 1), (str(SIDE), 0)):
        assert detect.main([*flags, "--imgsz", size]) == 0
        assert capsys.readouterr().out.count("was exported for 32x32 pixels: --imgsz 64 does not apply") == said


def test_open_sizes(tmp_path):
    path = save(confident(float_detector(TINY)), tmp_path / "best.pt")
    run_export(path, "--include", *("torchscript", "openvino", "onnx"), "--dynamic")
    for file in files_of(path):
        backend = load_backend(file)
        assert backend.fixed_batch is None and backend.fixed_size is None
        for shape in ((1, 32, 32), (3, 64, 32)):
            batch = images(*shape)
            expected = decoded_by_torch(confident(float_detector(TINY)), batch)
            torch.testing.assert_close(backend(batch)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_missing_package_is_named_where_a_file_is_read(float_files, monkeypatch):
    for package, file in (("openvino", float_files[1]), ("onnxruntime", float_files[0])):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"pip install {package}"):
            load_backend(file)


def test_broken_files_are_refused(tmp_path, float_files):
    (tmp_path / "m.torchscript").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a TorchScript file"):
        load_backend(tmp_path / "m.torchscript")
    (tmp_path / "m.xml").write_text("<nothing/>")
    with pytest.raises(UserError, match="OpenVINO cannot load it"):
        load_backend(tmp_path / "m.xml")
    (tmp_path / "empty_openvino_model").mkdir()
    with pytest.raises(UserError, match=r"expected one \.xml of OpenVINO in this folder, found 0"):
        load_backend(tmp_path / "empty_openvino_model")


def test_the_same_network_gives_the_same_picture_in_every_format(float_files, tmp_path):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "a.png"), cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (SIDE, SIDE)))
    texts = []
    for file in (float_files[0].with_name("best.pt"), *float_files):
        flags = ["--weights", str(file), "--source", str(tmp_path / "a.png"), "--project", str(tmp_path / file.name)]
        assert detect.main([*flags, "--imgsz", str(SIDE), "--conf", "0.2", "--save-txt", "--nosave"]) == 0
        texts.append((tmp_path / file.name / "exp" / "labels" / "a.txt").read_text())
    rows = [np.array([line.split() for line in text.splitlines()], float) for text in texts]
    assert len(rows[0]) > 1
    for other in rows[1:]:
        np.testing.assert_allclose(other, rows[0], atol=1e-4)
