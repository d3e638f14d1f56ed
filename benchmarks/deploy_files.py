"""The files that benchmarks/deploy.py compares: ours, written as export.py writes them, and those of other tools."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import onnx  # noqa: E402
import torch  # noqa: E402

from exporting.onnx_files import OnnxPlan, OnnxWriter  # noqa: E402
from exporting.openvino_files import read_onnx  # noqa: E402
from exporting.pictures import drawn_images  # noqa: E402
from exporting.subject import read_subject  # noqa: E402
from models.backend import load_network  # noqa: E402
from models.yolo import DetectionModel  # noqa: E402
from quant.calibrate import calibrate  # noqa: E402
from quant.config import QuantConfig  # noqa: E402
from quant.prepare import prepare  # noqa: E402
from utils.checkpoint import save_checkpoint  # noqa: E402
from utils.log import LOGGER  # noqa: E402

CALIBRATION_SIDE = 320
INPUT = "images"


def network(name: str, weights: Path | None) -> DetectionModel:
    """The weights' network, or one with random weights whose batch norms know their statistics."""
    if weights is not None:
        return load_network(weights)[0].eval()
    torch.manual_seed(0)
    model = DetectionModel(f"{name}.yaml").train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.stack(drawn_images((CALIBRATION_SIDE,) * 2, 4)))
    return model.eval()


def quantized(model: DetectionModel, output: int | None) -> DetectionModel:
    """``model`` with 4-bit weights and inputs, calibrated on drawn images; it is changed."""
    keys = {"weight": {"bits": 4}, "activation": {"bits": 4, "output": output}}
    prepare(model, QuantConfig.from_dict(keys))
    calibrate(model, [torch.stack(drawn_images((CALIBRATION_SIDE,) * 2, 4))])
    return model.eval()


def save(model: DetectionModel, path: Path) -> Path:
    """A checkpoint, from which files are written."""
    stored = {
        "model_yaml": model.yaml,
        "names": model.names,
        "stride": model.stride.tolist(),
        "model": model.state_dict(),
        "ema": None,
        "quantization": getattr(model, "quantization", None),
        "options": {},
    }
    save_checkpoint(stored, path)
    return path


def write_ours(name: str, weights: Path | None, size: int, folder: Path) -> dict[str, Path]:
    """Float, storage and speed files, as ONNX and, where OpenVINO is installed, as OpenVINO models."""
    openvino = module("openvino")
    files = {}
    plans = {
        "float": (lambda: network(name, weights), {"float": OnnxPlan()}),
        "w4a4": (
            lambda: quantized(network(name, weights), None),
            {"storage": OnnxPlan(int4_weights=True), "speed": OnnxPlan()},
        ),
        "w4a4_output8": (lambda: quantized(network(name, weights), 8), {"speed, output 8": OnnxPlan()}),
    }
    for stem, (make, wanted) in plans.items():
        writer = OnnxWriter(read_subject(save(make(), folder / f"{stem}.pt"), [size], torch.device("cpu")))
        for kind, plan in wanted.items():
            files[kind] = folder / f"{stem}{'_storage' * plan.int4_weights}.onnx"
            onnx.save_model(writer.build(plan).model, str(files[kind]))
            if openvino is not None:
                source = folder / "for_openvino.onnx"
                onnx.save_model(writer.build(replace(plan, own_operators=False)).model, str(source))
                converted = files[kind].with_suffix(".xml")
                openvino.save_model(read_onnx(openvino, source), str(converted), compress_to_fp16=False)
    return files


def write_onnxruntime_int8(float_file: Path, size: int, target: Path) -> Path:
    """onnxruntime's own static quantization: 8 bits, a scale per output channel, QuantizeLinear pairs."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(drawn_images((size, size), 4))

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image.unsqueeze(0).numpy()}

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(float_file, target, Images(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    return target


def write_nncf_int8(float_file: Path, size: int, target: Path) -> Path | None:
    """NNCF's post-training quantization with its preset for activations of both signs; None without NNCF."""
    openvino, nncf = module("openvino"), module("nncf")
    if openvino is None or nncf is None:
        LOGGER.warning("NNCF's INT8 is left out: pip install nncf openvino")
        return None
    images = [image.unsqueeze(0).numpy() for image in drawn_images((size, size), 4)]
    model = openvino.Core().read_model(str(float_file))
    preset = nncf.QuantizationPreset.MIXED
    openvino.save_model(nncf.quantize(model, nncf.Dataset(images), preset=preset, subset_size=len(images)), str(target))
    return target


def module(name: str):
    """An optional package, or None."""
    try:
        return __import__(name)
    except ImportError:
        return None


def megabytes(path: Path) -> float:
    """Size of a file, of an OpenVINO model with its weights."""
    weights = path.with_suffix(".bin")
    extra = weights.stat().st_size if path.suffix == ".xml" else 0
    return (path.stat().st_size + extra) / 1e6
