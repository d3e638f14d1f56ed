"""Writes a trained detector for other runtimes, and compares the files with the network before it reports success.

Usage:
    python export.py --weights runs/train/exp/weights/best.pt --include onnx openvino torchscript
    python export.py --weights yolov5s.pt --include onnx --imgsz 640 --dynamic
    python export.py --weights best.pt best.onnx --verify data.yaml     # writes nothing: compares on your images

A float checkpoint becomes ``best.onnx``. A quantized one becomes two files with the same codes in them:
    best.onnx           the speed file: weights of one byte, codes of one byte through Concat, Resize and MaxPool
    best_storage.onnx   the storage file: weights of at most 4 bits packed two to a byte (opset 21)
The other formats: ``best_openvino_model/`` and ``best.torchscript``. docs/deploy.md shows how to use them.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from exporting.agreement import compare_on_data, table
from exporting.formats import FORMATS, choose_formats
from exporting.onnx_files import OnnxPlan, OnnxWriter, write_verified
from exporting.openvino_files import write_openvino
from exporting.pictures import verification_images
from exporting.record import ExportedFile, milliseconds_per_image, write_record
from exporting.subject import Subject, read_subject
from exporting.torchscript_files import write_torchscript
from models.backend import OPENVINO_SUFFIX, is_exported
from quant.onnx_graph import DEFAULT_OPSET
from quant.verify import Reference, references
from run_report.write import PAGE, write_files
from utils.command import CommandParser, exit_code
from utils.devices import select_device
from utils.errors import UserError
from utils.log import LOGGER, set_verbose
from utils.progress import progress
from utils.results import newest_weights
from utils.suppression import Suppression

STORAGE_SUFFIX = "_storage"
LOWEST_OPSET = 12


# Flags of YOLOv5 that are not here -> what takes their place.
REPLACED = {
    "--inplace": "of no use: nothing is computed in place",
    "--keras": "TensorFlow files are made from the ONNX file (onnx2tf)",
    "--optimize": "mobile TorchScript is made from the exported file with torch.utils.mobile_optimizer",
    "--per-tensor": "the recipe's weight.granularity: tensor",
    "--cache": "TensorRT engines are built from the ONNX file by trtexec",
    "--mlmodel": "Core ML files are made from the TorchScript file (coremltools)",
    "--workspace": "TensorRT engines are built from the ONNX file by trtexec",
    "--topk-per-class": "suppression in a graph has one limit for all classes",
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; abbreviations such as --batch and --img are allowed."""
    parser = CommandParser(description=__doc__, replaced=REPLACED)
    parser.add_argument("--data", default=None, help="dataset YAML whose val images verify the files (the trained one)")
    parser.add_argument("--weights", nargs="+", default=None, help=".pt; the newest best.pt of runs/train")
    parser.add_argument(
        "--imgsz", "--img", "--img-size", nargs="+", type=int, default=None, help="pixels: side, or height and width"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images that the file takes at once")
    parser.add_argument("--device", default="cpu", help="cuda device, such as 0, or cpu: where the network is traced")
    parser.add_argument("--half", action="store_true", help="16-bit floats (float models)")
    parser.add_argument("--int8", action="store_true", help="of YOLOv5; here: train.py --quant lsq --bits 8 --epochs 0")
    parser.add_argument("--dynamic", action="store_true", help="leave batch size, height and width open")
    parser.add_argument("--simplify", action="store_true", help="ONNX: run onnxslim over the graph")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="version of the ONNX operators")
    parser.add_argument("--nms", action="store_true", help="ONNX, OpenVINO: suppress overlapping boxes in the graph")
    parser.add_argument("--agnostic-nms", action="store_true", help="with --nms: across classes")
    parser.add_argument("--conf-thres", type=float, default=0.25, help="with --nms: confidence threshold")
    parser.add_argument("--iou-thres", type=float, default=0.45, help="with --nms: IoU threshold")
    parser.add_argument("--max-det", "--topk-all", type=int, default=300, help="with --nms: rows of the output")
    parser.add_argument("--include", nargs="+", default=["onnx"], help=f"formats: {', '.join(FORMATS)}")
    parser.add_argument("--verify", default=None, metavar="DATA", help="dataset YAML: compare mAP and codes on it")
    parser.add_argument("--verbose", action="store_true", help="say what was compared, file by file")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[ExportedFile]:
    """Exports every weights file; with exported ones among them, only compares these (see ``verify_on_data``)."""
    formats = choose_formats(options.include)
    if options.opset < LOWEST_OPSET:
        raise UserError(f"--opset {options.opset}: at least {LOWEST_OPSET} is needed")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be 1 or more")
    if options.int8:
        raise UserError(
            "--int8: quantize in training instead: train.py --quant lsq --bits 8 (--epochs 0: calibrate only)"
        )
    if options.nms and "torchscript" in formats:
        raise UserError("--nms: suppression is written into onnx and openvino; leave torchscript out of --include")
    weights = [Path(path) for path in options.weights or [newest_weights()]]
    given = [path for path in weights if is_exported(path)]
    if not given:
        return [file for path in weights for file in export_file(path, formats, options)]
    if not options.verify or len(given) != len(weights) - 1:
        raise UserError(
            f"--weights {given[0]} is exported already. To compare it with its checkpoint: "
            f"--weights best.pt {given[0]} --verify data.yaml"
        )
    subject = read_subject(next(path for path in weights if path not in given), options.imgsz, select_device("cpu"))
    verify_on_data(subject, given, options.verify)
    return []


def export_file(path: Path, formats: list[str], options: argparse.Namespace) -> list[ExportedFile]:
    """Writes the files of one checkpoint beside it, each only after it was verified.

    Raises:
        UserError: not a checkpoint, options that do not go together, or a file that does not compute what the network
            computes (it is then not kept).
    """
    start = time.perf_counter()
    subject = read_subject(path, options.imgsz, select_device(options.device))
    if options.half and subject.quantized:
        raise UserError(f"{path} is quantized: --half is for float models")
    if options.verify and not options.dynamic and subject.size[0] != subject.size[1]:
        height, width = subject.size
        raise UserError(f"--verify needs a square or dynamic input, not {height}x{width}: add --dynamic")
    images, source = verification_images(options.data or options.verify, subject.weights, subject.size)
    writer, plan = OnnxWriter(subject), _plan(options)
    files = []
    with progress(label=f"tracing {path.name}", total=len(formats) + 1) as bar:
        if formats != ["torchscript"]:
            writer.trace(plan)  # on the device that was asked for; everything behind it on the CPU
        subject.folded = subject.folded.cpu()
        trained = subject.trained if subject.quantized else None
        expected = references(subject.folded, images, 1 if options.dynamic else options.batch_size, trained)
        for name in formats:
            bar.set_description_str(f"writing {name}", refresh=False)
            bar.update()
            for file in _WRITERS[name](writer, plan, expected):
                file.milliseconds = milliseconds_per_image(file.path, subject.size)
                LOGGER.info(f"{file.path.name}: {file.purpose}, {file.verification.summary()}")
                LOGGER.debug(file.verification.table())
                files.append(file)
    update_report(files, subject.size, f"{len(images)} {source}")
    data = options.verify or options.data or subject.weights.trained_with("data")
    report(subject, files, options, data, time.perf_counter() - start)
    if options.verify:
        verify_on_data(subject, [file.path for file in files], options.verify)
    return files


def _plan(options: argparse.Namespace) -> OnnxPlan:
    suppression = None
    if options.nms:
        suppression = Suppression(options.conf_thres, options.iou_thres, options.max_det, options.agnostic_nms)
    return OnnxPlan(
        opset=options.opset, batch_size=options.batch_size, dynamic=options.dynamic, half=options.half,
        simplify=options.simplify, suppression=suppression,
    )  # fmt: skip


def _onnx_files(writer: OnnxWriter, plan: OnnxPlan, expected: list[Reference]) -> Iterator[ExportedFile]:
    subject = writer.subject
    purposes = {subject.path.with_suffix(".onnx"): ("speed file" if subject.quantized else "float file", plan)}
    if subject.quantized:
        storage = subject.path.with_name(subject.path.stem + STORAGE_SUFFIX + ".onnx")
        purposes[storage] = ("storage file", replace(plan, int4_weights=True))
    for target, (purpose, own_plan) in purposes.items():
        result = write_verified(writer.build(own_plan), target, subject.folded, expected)
        yield ExportedFile(target, purpose, result)


def _openvino_folder(writer: OnnxWriter, plan: OnnxPlan, expected: list[Reference]) -> Iterator[ExportedFile]:
    path = writer.subject.path
    folder = path.with_name(path.stem + OPENVINO_SUFFIX)
    exported = writer.build(replace(plan, own_operators=False))
    result = write_openvino(exported, folder, path.stem, writer.subject.folded, expected, plan.half)
    yield ExportedFile(folder, "OpenVINO", result)


def _torchscript_file(writer: OnnxWriter, plan: OnnxPlan, expected: list[Reference]) -> Iterator[ExportedFile]:
    target = writer.subject.path.with_suffix(".torchscript")
    result = write_torchscript(writer.subject, target, expected, plan.batch_size, plan.half)
    yield ExportedFile(target, "TorchScript", result)


_WRITERS: dict[str, Callable[[OnnxWriter, OnnxPlan, list[Reference]], Iterator[ExportedFile]]] = {
    "onnx": _onnx_files,
    "openvino": _openvino_folder,
    "torchscript": _torchscript_file,
}


def update_report(files: list[ExportedFile], size: tuple[int, int], pictures: str) -> None:
    """Puts the files into the page about the run that their checkpoint belongs to, if it does to one."""
    folder = files[0].path.resolve().parents[1]
    if not (folder / "opt.yaml").is_file():
        return
    write_record(files, size, pictures)
    if (folder / PAGE).is_file():
        write_files(folder)


def verify_on_data(subject: Subject, files: list[Path], data: str) -> None:
    """Prints how the files compare with the network on a data set.

    Raises:
        UserError: a file does not agree; the text is the table.
    """
    LOGGER.info(f"Measuring {subject.path} and {', '.join(str(file) for file in files)} on {data} ...")
    results = compare_on_data(subject, files, data)
    text = table(subject, results, data)
    if any(result.problems for result in results):
        raise UserError(f"--verify {data}: a file does not compute what the network does\n{text}")
    LOGGER.info(text)


def report(
    subject: Subject, files: list[ExportedFile], options: argparse.Namespace, data: object, seconds: float
) -> None:
    """Says what was written, and the three commands that come next; ``data`` is what it can be measured on, or None."""
    size = subject.size
    shape = "any batch and size" if options.dynamic else f"batch {options.batch_size}, {size[0]}x{size[1]}"
    LOGGER.info(f"Exported {subject.path} in {seconds:.1f} s ({shape}), every file verified:")
    for file in files:
        time_taken = f"{file.milliseconds:8.1f} ms"
        LOGGER.info(f"{file.megabytes:8.2f} MB {time_taken} an image on the CPU  {file.path}  ({file.purpose})")
    first, checkpoint, data = (shlex.quote(str(word)) for word in (files[0].path, subject.path, data or "your.yaml"))
    square = "" if options.dynamic else " --square"
    if options.dynamic or size[0] == size[1]:
        side = f"--imgsz {max(size)}"
        LOGGER.info(f"Measure it:  python val.py --weights {first} --data {data} {side}{square}")
        LOGGER.info(f"Use it:      python detect.py --weights {first} {side} --source image.jpg")
        LOGGER.info(f"Prove it:    python export.py --weights {checkpoint} {first} --verify {data} {side}")
    else:
        LOGGER.info(f"Use it:      python detect.py --weights {first} --imgsz {size[0]} {size[1]} --source image.jpg")
        LOGGER.info("val.py and --verify measure square images: export with --dynamic, or a square --imgsz, for these")
    LOGGER.info("In your own program, from Python or C++: docs/deploy.md")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    set_verbose(options.verbose)
    return exit_code("export.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
