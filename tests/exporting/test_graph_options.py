"""What flags do to the files: suppression in the graph, onnxslim, 16 bits, and what is refused."""

import sys

import onnx
import pytest
import torch
from exported_files import SIDE, files_of, run_export
from small_detector import TINY, confident, float_detector, images, save, tiny_detector

import export
from exporting.onnx_files import OnnxPlan, OnnxWriter
from exporting.subject import read_subject
from models.backend import load_backend, suppress
from utils.nms import non_max_suppression


def decoded_by_torch(model, batch):
    with torch.no_grad():
        return model(batch)[0]


@pytest.mark.parametrize("flags", [[], ["--dynamic", "--agnostic-nms"]])
def test_suppression_inside_finds_the_same_boxes(tmp_path, flags):
    path = save(confident(tiny_detector("lsq", 8)), tmp_path / "best.pt")
    run_export(path, "--include", "onnx", "openvino", "--nms", "--conf", 0.1, "--iou", 0.6, "--max-det", 20, *flags)
    batch = images(2, SIDE, SIDE)
    for file in files_of(path)[:2]:
        backend = load_backend(file)
        own = backend.suppression
        assert (own.confidence, own.iou, own.max_detections, own.agnostic) == (0.1, 0.6, 20, bool(flags))
        plain = load_backend(path)(batch)[0]
        wanted = non_max_suppression(plain, 0.1, 0.6, agnostic=bool(flags), max_detections=20)
        found, _ = backend(batch)
        assert [len(boxes) for boxes in found] == [len(boxes) for boxes in wanted] and min(map(len, wanted)) > 1
        for ours, theirs in zip(wanted, found, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=0.2)
        some = suppress(found, own, 0.3, 0.1, classes=[0, 2], max_detections=3)
        for kept, boxes in zip(some, found, strict=True):
            chosen = boxes[(boxes[:, 4] > 0.3) & (boxes[:, 5] != 1)][:3]
            assert torch.equal(kept, chosen)


def test_onnxslim_leaves_codes_and_boxes(tmp_path):
    path = save(tiny_detector("lsq", 4), tmp_path / "best.pt")
    subject = read_subject(path, [SIDE], torch.device("cpu"))
    writer = OnnxWriter(subject)
    plain, slim = (len(writer.build(OnnxPlan(simplify=flag)).model.graph.node) for flag in (False, True))
    assert slim < plain
    assert (
        export.main(["--weights", str(path), "--imgsz", str(SIDE), "--simplify", "--nms"]) == 0
    )  # it verifies the result
    weights = [tensor for tensor in onnx.load(str(path.with_suffix(".onnx"))).graph.initializer]
    assert sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4 for tensor in weights) > 8


@pytest.mark.parametrize(
    "package, flags", [("openvino", ["--include", "openvino"]), ("onnxslim", ["--simplify"])]
)  # fmt: skip
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, package, flags):
    path = save(confident(float_detector(TINY)), tmp_path / "best.pt")
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way of saying that it is not there
    assert export.main(["--weights", str(path), "--imgsz", str(SIDE), *flags]) == 1
    assert f"pip install {package}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--include", "engine"], "trtexec --onnx=best.onnx"),
        (["--include", "torchscript", "--nms"], "leave torchscript out"),
        (["--int8"], "train.py --quant lsq --bits 8"),
        (["--nms", "--conf", "7"], "--conf-thres 7"),
    ],
)
def test_what_does_not_go_together(tmp_path, capsys, flags, reason):
    path = save(confident(float_detector(TINY)), tmp_path / "best.pt")
    assert export.main(["--weights", str(path), "--imgsz", str(SIDE), *flags]) == 1
    assert reason in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_half_precision(tmp_path):
    path = save(confident(float_detector(TINY)), tmp_path / "best.pt")
    run_export(path, "--include", *("torchscript", "openvino", "onnx"), "--half", "--dynamic")
    batch = images(2, SIDE, SIDE)
    expected = decoded_by_torch(confident(float_detector(TINY)), batch)
    for file in files_of(path):
        decoded = load_backend(file)(batch)[0]
        assert decoded.dtype == torch.float32 and (decoded - expected).norm() / expected.norm() < 0.01
