"""Finds objects in images, videos and streams.

Usage:
    python detect.py --weights runs/train/exp/weights/best.pt --source image.jpg
    python detect.py --weights best.onnx --source 'folder/*.jpg' --save-txt --classes 0 2
    python detect.py --weights best.pt --source 0                      (a camera; rtsp://... and http://... are streams)
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from models.backend import Backend, TorchBackend, suppress
from models.combined import open_weights
from utils.allocation import keep_freed_memory
from utils.boxes import crop_region, scale_boxes
from utils.command import CommandParser, exit_code
from utils.detections import count_text
from utils.devices import select_device
from utils.downloads import download, file_name
from utils.drawing import Annotator, class_color
from utils.errors import UserError
from utils.feature_maps import saved_features
from utils.images import letterbox, write_image
from utils.log import LOGGER
from utils.paths import ROOT, WORK, results_folder
from utils.results import label_name, newest_weights, save_text
from utils.sources import Frame, Sources
from utils.streams import Streams, file_address, is_stream
from utils.timing import Stopwatch

DEFAULT_SOURCE = str(ROOT / "data" / "images")


def image_to_tensor(image: np.ndarray, size: tuple[int, int], stride: int, auto: bool, device: torch.device) -> Tensor:
    """BGR uint8 (h, w, 3) -> letterboxed RGB float32 (1, 3, H, W) in 0..1; with ``auto`` only padded to the stride."""
    boxed, _ratio, _padding = letterbox(image, size, auto=auto, stride=stride)
    planes = np.ascontiguousarray(boxed[..., ::-1].transpose(2, 0, 1))
    return torch.from_numpy(planes).to(device).float()[None] / 255


class Writer:
    """Writes what was found: pictures, videos, label files, crops and a table, as the options ask."""

    def __init__(self, folder: Path, names: Mapping[int, str], options: argparse.Namespace) -> None:
        self.folder, self.names, self.options = folder, names, options
        self.videos: dict[Path, tuple[cv2.VideoWriter, tuple[int, int]]] = {}  # file -> writer, width and height
        self.shows = options.view_img
        self.table: list[tuple[str, str, str]] = []
        if options.save_txt:
            (folder / "labels").mkdir(parents=True, exist_ok=True)

    def add(self, frame: Frame, detections: Tensor) -> None:
        """Takes one frame and its detections (n, 6) x1, y1, x2, y2, confidence, class in the frame's pixels."""
        options = self.options
        suffix = f"_{frame.index}" if frame.is_video else ""
        if options.save_txt:
            layout = "corners" if options.save_format else "normalised"
            labels = self.folder / "labels"
            save_text(labels, frame.path, detections, frame.image.shape, options.save_conf, suffix, layout)
        if options.save_csv:
            self.table += [
                (frame.path.name, self.names[int(label)], f"{score:.2f}")
                for score, label in detections[:, 4:6].tolist()
            ]
        if options.save_crop:
            self._crop(frame, detections)
        if options.nosave and not self.shows:
            return
        drawn = self._draw(frame.image, detections)
        if self.shows:
            self.shows = _show(frame, drawn)
        if not options.nosave:
            self._save(frame, drawn)

    def close(self) -> None:
        """Finishes the last video and writes the table."""
        self._finish_videos()
        if self.options.save_csv:
            with open(self.folder / "predictions.csv", "w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([("Image Name", "Prediction", "Confidence"), *self.table])

    def _draw(self, image: np.ndarray, detections: Tensor) -> np.ndarray:
        annotator = Annotator(image.copy(), self.options.line_thickness)
        # The most confident last, so that its caption lies on top.
        for *corners, score, label in reversed(detections.tolist()):
            name = self.names[int(label)]
            caption = name if self.options.hide_conf else f"{name} {score:.2f}"
            annotator.box(corners, "" if self.options.hide_labels else caption, class_color(int(label)))
        return annotator.image

    def _crop(self, frame: Frame, detections: Tensor) -> None:
        for number, (*corners, _score, label) in enumerate(detections.tolist(), 1):
            rows, columns = crop_region(corners, frame.image.shape)
            name = "".join(c if c.isalnum() or c in " -_" else "_" for c in self.names[int(label)])
            folder = self.folder / "crops" / name
            folder.mkdir(parents=True, exist_ok=True)
            place = f"_{frame.index}" if frame.is_video else ""
            write_image(folder / f"{frame.path.stem}{place}_{number}.jpg", frame.image[rows, columns])

    def _save(self, frame: Frame, drawn: np.ndarray) -> None:
        if not frame.is_video:
            write_image(self.folder / frame.path.name, drawn)
            return
        file = (self.folder / frame.path.name).with_suffix(".mp4")
        if file not in self.videos:
            if not frame.is_live:
                self._finish_videos()
            self.videos[file] = self._open_video(file, frame, drawn)
        video, size = self.videos[file]
        video.write(drawn if drawn.shape[1::-1] == size else cv2.resize(drawn, size))

    def _open_video(self, file: Path, frame: Frame, drawn: np.ndarray) -> tuple[cv2.VideoWriter, tuple[int, int]]:
        height, width = drawn.shape[:2]
        rate = frame.fps / self.options.vid_stride
        video = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
        if not video.isOpened():
            raise UserError(f"{file}: OpenCV cannot write this video; use --nosave with --save-txt")
        return video, (width, height)

    def _finish_videos(self) -> None:
        for video, _ in self.videos.values():
            video.release()
        self.videos.clear()


def _show(frame: Frame, drawn: np.ndarray) -> bool:
    """Shows a picture in a window; returns whether that is possible here. Pressing q ends the program."""
    try:
        cv2.imshow(frame.path.name, drawn)
        pressed = cv2.waitKey(1) & 0xFF
    except cv2.error:
        LOGGER.warning(
            "--view-img: there is no display here, or this OpenCV has no windows (it needs opencv-python in place of "
            "opencv-python-headless). Nothing is shown; results are written as without the flag"
        )
        return False
    if pressed == ord("q"):
        raise KeyboardInterrupt
    return True


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; abbreviations such as --conf and --iou are allowed."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", default=None, help=".pt, .onnx, .torchscript, OpenVINO; newest best.pt")
    parser.add_argument(
        "--source", default=DEFAULT_SOURCE,
        help="file, folder, pattern, list (.txt), web address, camera number, stream, list of those (.streams)",
    )  # fmt: skip
    parser.add_argument("--data", default=None, help="dataset YAML: class names for files that carry none")
    parser.add_argument("--imgsz", "--img", "--img-size", nargs="+", type=int, default=[640], help="height, width")
    parser.add_argument("--conf-thres", type=float, default=0.25, help="confidence threshold")
    parser.add_argument("--iou-thres", type=float, default=0.45, help="IoU threshold of the suppression")
    parser.add_argument("--max-det", type=int, default=1000, help="detections kept per image")
    parser.add_argument("--device", default="", help="cuda device, such as 0, or cpu")
    parser.add_argument("--view-img", action="store_true", help="show results in a window")
    parser.add_argument("--save-txt", action="store_true", help="write detections as label files")
    parser.add_argument("--save-format", type=int, default=0, choices=(0, 1), help="of them: 0 YOLO, 1 pixel corners")
    parser.add_argument("--save-csv", action="store_true", help="write one table of all detections")
    parser.add_argument("--save-conf", action="store_true", help="add confidences to the label files")
    parser.add_argument("--save-crop", action="store_true", help="write every object found as a picture of its own")
    parser.add_argument("--nosave", action="store_true", help="write no pictures or videos")
    parser.add_argument("--classes", nargs="+", type=int, default=None, help="keep these classes: --classes 0 2 3")
    parser.add_argument("--agnostic-nms", action="store_true", help="boxes suppress each other across classes")
    parser.add_argument("--project", default=str(WORK / "runs" / "detect"), help="results go to project/name")
    parser.add_argument("--name", default="exp", help="name of the run")
    parser.add_argument("--exist-ok", action="store_true", help="write into an existing project/name")
    parser.add_argument("--line-thickness", type=int, default=3, help="of the boxes, in pixels")
    parser.add_argument("--hide-labels", action="store_true", help="draw boxes without captions")
    parser.add_argument("--hide-conf", action="store_true", help="draw captions without confidences")
    parser.add_argument("--augment", action="store_true", help="three passes: mirrored and smaller too")
    parser.add_argument("--visualize", action="store_true", help="write pictures of every layer's output")
    parser.add_argument("--update", action="store_true", help="refused: weights files are never rewritten")
    parser.add_argument("--half", action="store_true", help="16-bit floats: on CUDA, and in OpenVINO")
    parser.add_argument("--dnn", action="store_true", help="refused: ONNX files run in onnxruntime")
    parser.add_argument("--vid-stride", type=int, default=1, help="take every so many frames of a video")
    return parser.parse_args(arguments)


def _input_size(options: argparse.Namespace, backend: object) -> tuple[int, int]:
    if backend.fixed_size:
        height, width = backend.fixed_size
        if options.imgsz not in ([640], [height], [height, width]):  # 640: nothing was asked for
            asked = " ".join(map(str, options.imgsz))
            LOGGER.warning(f"{backend.path} was exported for {height}x{width} pixels: --imgsz {asked} does not apply")
        return height, width
    if len(options.imgsz) > 2 or min(options.imgsz) < 1:
        raise UserError(f"--imgsz {' '.join(map(str, options.imgsz))}: give one number, or height and width")
    height, width = options.imgsz if len(options.imgsz) == 2 else options.imgsz * 2
    stride = int(backend.stride)
    rounded = -(-height // stride) * stride, -(-width // stride) * stride
    if rounded != (height, width):
        LOGGER.warning(f"--imgsz {height} {width} is no multiple of the stride {stride}: {rounded} is used")
    return rounded


def _check(options: argparse.Namespace, names: Mapping[int, str]) -> None:
    for flag, value in (("--conf-thres", options.conf_thres), ("--iou-thres", options.iou_thres)):
        if not 0 <= value <= 1:
            raise UserError(f"{flag} {value}: must lie between 0 and 1")
    if options.line_thickness < 1:
        raise UserError(f"--line-thickness {options.line_thickness}: at least 1 pixel")
    unknown = [label for label in options.classes or () if label not in names]
    if unknown:
        raise UserError(f"--classes {unknown[0]}: the model has classes 0 to {max(names)}")


def _say_suppression(backend: Backend, options: argparse.Namespace) -> None:
    own = backend.suppression
    asked = (options.iou_thres, options.agnostic_nms or own.agnostic)
    if asked != (own.iou, own.agnostic) or own.confidence > options.conf_thres:
        LOGGER.warning(
            f"{backend.path} suppresses boxes itself, with confidence {own.confidence:g}, IoU {own.iou:g}"
            f"{', across classes' if own.agnostic else ''}: --iou-thres, --agnostic-nms and a lower --conf-thres "
            "change nothing"
        )


def _refuse(options: argparse.Namespace) -> None:
    """Raises UserError for flags of upstream that this project does not have, with what takes their place."""
    if options.update:
        raise UserError("--update: weights files are never rewritten; official ones are read as they are")
    if options.dnn:
        raise UserError("--dnn: ONNX files run in onnxruntime, not in OpenCV: leave the flag out")
    if options.source == DEFAULT_SOURCE and not Path(options.source).exists():
        raise UserError(
            "give --source: a file, folder, pattern, camera or address. YOLOv5's photos are not part of this project"
        )
    if options.source.lower().startswith("screen"):
        raise UserError("--source screen: screens are not read; record a video, or give a camera or stream")


def open_sources(source: str, stride: int) -> Sources | Streams:
    """What to run on: files, or cameras and streams."""
    return Streams(source, stride) if is_stream(source) else Sources(source, stride)


def fetch(address: str, folder: Path) -> Path:
    """Downloads an image or video, which was asked for by its address, into the folder of the results."""
    return download(address, folder / "source" / file_name(address))


def _visualized(backend: Backend, folder: Path, wanted: bool) -> AbstractContextManager:
    return saved_features(backend.model.model, folder) if wanted else nullcontext()


@torch.no_grad()
def run(options: argparse.Namespace) -> Path:
    """Does what the command line asks for and returns the folder of the results."""
    _refuse(options)
    device = select_device(options.device)
    files = options.weights or [newest_weights()]
    backend = open_weights(files, device, options.data, options.half, options.augment)
    if options.visualize and not isinstance(backend, TorchBackend):
        raise UserError("--visualize shows the layers of one PyTorch checkpoint (.pt), without --augment")
    names = {label: label_name(backend.names, label) for label in range(backend.nc)}
    _check(options, names)
    if backend.suppression:
        _say_suppression(backend, options)
    size = _input_size(options, backend)
    # Sources are opened first: a wrong one leaves no empty folder behind.
    sources = None if file_address(options.source) else open_sources(options.source, options.vid_stride)
    folder = results_folder(options.project, options.name, options.exist_ok)
    sources = sources or Sources(fetch(options.source, folder), options.vid_stride)
    watches = [Stopwatch(device) for _ in range(3)]
    files_seen: dict[Path, None] = {}
    frames = 0
    with closing(Writer(folder, names, options)) as writer:
        for frame in sources:
            with watches[0]:
                images = image_to_tensor(frame.image, size, int(backend.stride), backend.fixed_size is None, device)
            before = watches[1].total
            with watches[1], _visualized(backend, folder / frame.path.stem, options.visualize):
                decoded, _raw = backend(images)
            with watches[2]:
                found = suppress(
                    decoded, backend.suppression, options.conf_thres, options.iou_thres, options.classes,
                    options.agnostic_nms, options.max_det,
                )[0].cpu()  # fmt: skip
            found[:, :4] = scale_boxes(images.shape[2:], found[:, :4], frame.image.shape)
            writer.add(frame, found)
            frames += 1
            files_seen[frame.path] = None
            place = f" ({frame.index + 1}/{frame.count})" if frame.is_video and not frame.is_live else ""
            height, width = images.shape[2:]
            LOGGER.info(
                f"{frame.kind} {len(files_seen)}/{len(sources)}{place} {frame.path}: "
                f"{height}x{width} {count_text(found, names)}, {(watches[1].total - before) * 1e3:.1f}ms"
            )
    each = [watch.total / max(frames, 1) * 1e3 for watch in watches]
    LOGGER.info("Speed: %.1fms pre-process, %.1fms inference, %.1fms NMS per image at shape %s", *each, (1, 3, *size))
    labels = f", {len(list((folder / 'labels').glob('*.txt')))} label files in {folder / 'labels'}"
    LOGGER.info(f"Results saved to {folder}{labels if options.save_txt else ''}")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    keep_freed_memory()
    try:
        return exit_code("detect.py", lambda: run(options))
    except KeyboardInterrupt:  # how one ends a camera
        LOGGER.info("Interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
