"""Writes a trained detector as ONNX, and runs the file against the network before it says that it succeeded.

Usage:
    python export.py --weights runs/train/exp/weights/best.pt --include onnx
    python export.py --weights yolov5s.pt --include onnx --imgsz 640 --dynamic

A float checkpoint becomes ``best.onnx``. A quantized one becomes two files with the same codes in them:
    best.onnx           the speed file: weights of one byte, codes of one byte through Concat, Resize and MaxPool
    best_storage.onnx   the storage file: weights of at most 4 bits packed two to a byte (opset 21)
"""

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backend import load_network
from models.yolo import DetectionModel
from quant.fold import fold
from quant.onnx_graph import DEFAULT_OPSET, INT4_OPSET, ExportedGraph, build, set_metadata, trace, traceable
from quant.verify import Reference, Verification, references, verify
from utils.checkpoint import Weights
from utils.dataset_yaml import load_dataset_yaml, prepare_dataset
from utils.devices import select_device
from utils.errors import UserError
from utils.images import letterbox, read_image
from utils.labels import list_images
from utils.log import LOGGER
from utils.results import newest_weights

FORMATS = ("onnx",)
STORAGE_SUFFIX = "_storage"
LOWEST_OPSET = 12
VERIFICATION_IMAGES = 4


@dataclass
class ExportedFile:
    """A file that was written, and how it compared with the network."""

    path: Path
    purpose: str
    verification: Verification

    @property
    def megabytes(self) -> float:
        return self.path.stat().st_size / 1e6


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; abbreviations such as --batch and --img are allowed."""
    parser = argparse.ArgumentParser(description="Export a detector and verify the exported file.")
    parser.add_argument("--data", default=None, help="dataset YAML whose val images verify the file (the trained one)")
    parser.add_argument("--weights", nargs="+", default=None, help=".pt; the newest best.pt of runs/train")
    parser.add_argument(
        "--imgsz", "--img", "--img-size", nargs="+", type=int, default=None, help="pixels: side, or height and width"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cuda device, such as 0, or cpu: where the network is traced")
    parser.add_argument("--half", action="store_true", help="16-bit floats (float models)")
    parser.add_argument("--dynamic", action="store_true", help="leave batch size, height and width open")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="version of the ONNX operators")
    parser.add_argument("--include", nargs="+", default=list(FORMATS), help=f"formats: {', '.join(FORMATS)}")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[ExportedFile]:
    """Exports every weights file; see ``export_file``."""
    unknown = [name for name in options.include if name.lower() not in FORMATS]
    if unknown:
        raise UserError(f"--include {' '.join(unknown)}: not a format this project writes; use {', '.join(FORMATS)}")
    if options.opset < LOWEST_OPSET:
        raise UserError(f"--opset {options.opset}: at least {LOWEST_OPSET} is needed")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be 1 or more")
    return [file for path in options.weights or [newest_weights()] for file in export_file(Path(path), options)]


def export_file(path: Path, options: argparse.Namespace) -> list[ExportedFile]:
    """Writes the ONNX files of one checkpoint beside it, each only after it was verified.

    Raises:
        UserError: not a checkpoint, options that do not go together, or a file that does not compute what the network
            computes (it is then not kept).
    """
    start = time.perf_counter()
    network, weights = load_network(path)
    network.eval()
    quantized = weights.quantization is not None
    if options.half and quantized:
        raise UserError(f"{path} is quantized: --half is for float models")
    size = image_size(options.imgsz, weights, int(max(network.stride)))
    device = select_device(options.device)
    folded = (fold(network) if quantized else copy.deepcopy(network).fuse()).eval().to(device)
    folded.model[-1].export = True
    images, source = verification_images(options.data, weights, size)
    traced = trace_network(folded, size, options, device)
    folded = folded.cpu()

    expected = references(folded, images, 1 if options.dynamic else options.batch_size, network if quantized else None)
    files = []
    plans = [(path.with_suffix(".onnx"), "speed file" if quantized else "float file", options.opset, False)]
    if quantized:
        storage = path.with_name(path.stem + STORAGE_SUFFIX + ".onnx")
        plans.append((storage, "storage file", max(options.opset, INT4_OPSET), True))
    for target, purpose, opset, int4_weights in plans:
        exported = build(traced, opset, int4_weights, (weights.quantization or {}).get("target", "onnxruntime"))
        set_metadata(exported.model, metadata(network, weights))
        result = write_verified(exported, target, folded, expected)
        LOGGER.info(f"{target}: {purpose}, compared with the network on {len(images)} {source}:\n{result.table()}")
        files.append(ExportedFile(target, purpose, result))
    used_data = options.data or weights.trained_with("data")
    report(path, files, size, options, used_data, time.perf_counter() - start)
    return files


def image_size(given: list[int] | None, weights: Weights, stride: int) -> tuple[int, int]:
    """(height, width) in pixels: as given, else what the checkpoint was trained on, else 640; multiples of the stride.

    Raises:
        UserError: not one or two positive numbers.
    """
    sides = list(given or [weights.trained_with("imgsz") or 640])
    if len(sides) > 2 or min(sides) < 1:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: give one side, or height and width, in pixels")
    height, width = (-(-side // stride) * stride for side in (sides[0], sides[-1]))
    if [height, width] != [sides[0], sides[-1]]:
        LOGGER.warning(f"--imgsz: sides must be multiples of {stride}; exporting {height}x{width}")
    return height, width


def trace_network(
    folded: nn.Module, size: tuple[int, int], options: argparse.Namespace, device: torch.device
) -> onnx.ModelProto:
    """Traces the network at the size and batch size asked for."""
    model = traceable(folded)
    example = torch.zeros(options.batch_size, 3, *size, device=device)
    if options.half:
        model, example = model.half(), example.half()
    return trace(model, example, options.opset, options.dynamic)


def metadata(network: DetectionModel, weights: Weights) -> dict[str, str]:
    """What readers need to know: ``stride`` and ``names`` as YOLOv5's own tools expect them, ``bits`` as JSON."""
    bits = {"weights": 32, "activations": 32}
    method = "float"
    if weights.quantization is not None:
        config = weights.quantization
        method = config["method"]
        bits = {
            "weights": config["weight"]["bits"],
            "activations": config["activation"]["bits"],
            "first_layer": config["first_layer_bits"],
            "detect": config["detect_bits"],
        }
        if config["activation"].get("output"):
            bits["outputs"] = config["activation"]["output"]
    stride = int(max(network.stride))
    return {"stride": str(stride), "names": str(network.names), "bits": json.dumps(bits), "method": method}


def verification_images(
    data: str | None, weights: Weights, size: tuple[int, int], count: int = VERIFICATION_IMAGES
) -> tuple[list[Tensor], str]:
    """Returns images (3, height, width) in 0..1 to compare on, and in words what they are.

    They come from ``data``, else from the data set the checkpoint was trained on if it is still there, else they are
    drawn.

    Raises:
        UserError: ``data`` was given and cannot be read.
    """
    used = data or weights.trained_with("data")
    try:
        if used:
            spec = load_dataset_yaml(used)
            prepare_dataset(spec)
            paths = list_images(spec.val)
            chosen = paths[:: max(1, len(paths) // count)][:count]
            images = [letterbox(read_image(path), size, auto=False)[0] for path in chosen]
            arrays = [np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)) for image in images]
            return [torch.from_numpy(array).float() / 255 for array in arrays], f"images of {spec.yaml_file.name}"
    except UserError:
        if data:
            raise
    return drawn_images(size, count), "drawn images (give real ones with --data)"


def drawn_images(size: tuple[int, int], count: int, seed: int = 0) -> list[Tensor]:
    """Deterministic test images (3, height, width) in steps of 1/255: smooth colours, hard-edged boxes, some noise."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        coarse = torch.rand(1, 3, 7, 7, generator=generator)
        image = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0]
        for _ in range(12):
            top, left, height, width = (
                torch.rand(4, generator=generator).mul(torch.tensor([*size, *size])).long().tolist()
            )
            colour = torch.rand(3, 1, 1, generator=generator)
            image[:, top : top + height // 3 + 4, left : left + width // 3 + 4] = colour
        image += 0.03 * torch.randn(image.shape, generator=generator)
        images.append(image.clamp(0, 1).mul(255).round() / 255)
    return images


def write_verified(exported: ExportedGraph, target: Path, folded: nn.Module, expected: list[Reference]) -> Verification:
    """Writes the file under a temporary name, reads it back, compares it with the network, and then names it.

    Raises:
        UserError: it cannot be written, or it does not compute what the network computes.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        onnx.save_model(exported.model, str(temporary))
        exported.model = onnx.load_model(str(temporary))
        result = verify(folded, exported, expected)
        if not result.holds:
            raise UserError(f"{target}: not written, it does not compute what the network does\n{result.table()}")
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return result


def report(
    path: Path,
    files: list[ExportedFile],
    size: tuple[int, int],
    options: argparse.Namespace,
    used_data: str | None,
    seconds: float,
) -> None:
    """Says what was written and what to do with it; ``used_data`` is the data set it can be measured on."""
    shape = "any batch and size" if options.dynamic else f"batch {options.batch_size}, {size[0]}x{size[1]}"
    LOGGER.info(f"Exported {path} in {seconds:.1f} s ({shape}):")
    for file in files:
        LOGGER.info(f"  {file.megabytes:8.2f} MB  {file.path}  ({file.purpose})")
    side = f"--imgsz {max(size)}"
    data = f" --data {used_data}" if used_data else ""
    LOGGER.info(f"Measure it:  python val.py --weights {files[0].path}{data} {side}")
    if not options.dynamic:
        LOGGER.info("             (its images are padded to squares; give --square to measure the .pt in the same way)")
    LOGGER.info(f"Use it:      python detect.py --weights {files[0].path} {side} --source image.jpg")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    try:
        run(options)
    except UserError as error:
        LOGGER.error(f"export.py: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
