"""Pictures of a run report: the same images seen by the float and the quantized network, and their attention maps."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from models.backend import load_backend, load_network
from models.yolo import DetectionModel
from quant.ada import simam_energy
from run_report.collect import RunFiles
from utils.boxes import xywhn_to_xyxy
from utils.dataset import DetectionDataset
from utils.dataset_yaml import load_dataset_yaml, prepare_dataset
from utils.iou import box_iou
from utils.nms import non_max_suppression
from utils.progress import progress
from utils.results import label_name

LOOKED_AT = 64  # validation images from which those that differ most are chosen
SHOWN = 6
CONFIDENCE, OVERLAP = 0.25, 0.5
# Okabe and Ito's colours, which the colour-blind can tell apart, as BGR; line widths differ as well.
COLOURS = {"lost": (0, 94, 213), "gained": (178, 114, 0)}
PALE, BLACK, FAINT = (255, 255, 255), (0, 0, 0), 0.45
SIDE = 420  # pixels of a picture's longer side at least: small images are enlarged so that captions can be read
JPEG_QUALITY = 82


@dataclass(frozen=True)
class Comparison:
    """One image under both networks; ``lost`` and ``gained`` count labelled objects, ``extra`` boxes on none."""

    name: str
    float_picture: str
    quantized_picture: str
    lost: int
    gained: int
    float_extra: int
    extra: int


@dataclass(frozen=True)
class Attention:
    """Attention maps of one image as pictures, a layer each."""

    name: str
    picture: str
    layers: Sequence[int]
    teacher: list[str]
    student: list[str]


def data_uri(image: np.ndarray) -> str:
    """A BGR picture as the text of a JPEG inside the page."""
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")


def validation_images(run: RunFiles, stride: int) -> DetectionDataset:
    """The run's validation split, square, not augmented.

    Raises:
        UserError: the data set is not there any more.
    """
    spec = load_dataset_yaml(run.options["data"])
    prepare_dataset(spec)
    single = bool(run.options.get("single_cls"))
    return DetectionDataset(spec.val, int(run.options["imgsz"]), stride=stride, single_class=single, prefix="report")


@torch.inference_mode()
def detect_all(weights: Path, images: Tensor) -> list[Tensor]:
    """Detections (n, 6) x1, y1, x2, y2, confidence, class above ``CONFIDENCE`` of each image (B, 3, H, W), 0 to 1."""
    backend = load_backend(weights, torch.device("cpu"))
    found = []
    for batch in progress(images.split(16), f"{weights.name} for the report"):
        found += non_max_suppression(backend(batch)[0], CONFIDENCE, OVERLAP)
    return found


def pick(dataset: DetectionDataset, images: int) -> tuple[Tensor, list[Tensor], list[str]]:
    """Evenly spaced images (B, 3, S, S) 0 to 1, their labels (m, 5) class, x1, y1, x2, y2 in pixels, file names."""
    count = min(images, len(dataset))
    chosen = [round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)]
    pixels, labels, names = [], [], []
    for index in chosen:
        image, rows, path, _ = dataset[index]
        pixels.append(image.float() / 255)
        rows = rows[:, -5:].clone()
        rows[:, 1:] = xywhn_to_xyxy(rows[:, 1:], image.shape[2], image.shape[1])
        labels.append(rows)
        names.append(Path(path).name)
    return torch.stack(pixels), labels, names


def found_labels(detections: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) bool: whether a detection lies on an object of its class; (m,) bool: whether that object was found."""
    if not len(detections) or not len(labels):
        return torch.zeros(len(detections), dtype=torch.bool), torch.zeros(len(labels), dtype=torch.bool)
    fits = (box_iou(detections[:, :4], labels[:, 1:]) >= OVERLAP) & (detections[:, 5:6] == labels[None, :, 0])
    return fits.any(1), fits.any(0)


def compare(run: RunFiles, dataset: DetectionDataset, names: dict[int, str]) -> tuple[list[Comparison], dict[str, int]]:
    """The images on which the two networks differ most, and how much they differ over all that were looked at."""
    images, labels, files = pick(dataset, LOOKED_AT)
    ours, theirs = detect_all(run.best_weights, images), detect_all(run.float_weights, images)
    totals = {"images": len(images), "objects": sum(map(len, labels)), "both": 0, "lost": 0, "gained": 0}
    scored = []
    for index, truth in enumerate(labels):
        before, after = found_labels(theirs[index], truth)[1], found_labels(ours[index], truth)[1]
        lost, gained = before & ~after, after & ~before
        for key, value in (("both", before & after), ("lost", lost), ("gained", gained)):
            totals[key] += int(value.sum())
        if changed := int(lost.sum() + gained.sum()):
            scored.append((changed, -index, lost, gained))
    shown = []
    for _, minus_index, lost, gained in sorted(scored, key=lambda row: row[:2], reverse=True)[:SHOWN]:
        index = -minus_index
        picture = (images[index].permute(1, 2, 0).numpy()[..., ::-1] * 255).round().astype(np.uint8)
        marks = {"lost": labels[index][lost], "gained": labels[index][gained]}
        before = draw(picture, theirs[index], marks, "lost", names)
        after = draw(picture, ours[index], marks, "gained", names)
        extra = [int((~found_labels(found[index], labels[index])[0]).sum()) for found in (theirs, ours)]
        shown.append(Comparison(files[index], before, after, int(lost.sum()), int(gained.sum()), *extra))
    return shown, totals


def draw(picture: np.ndarray, detections: Tensor, marks: dict[str, Tensor], found: str, names: dict) -> str:
    """The picture with its detections: thin and pale, wide and coloured where this network alone found the object.

    Args:
        marks: "lost" and "gained" -> the labels (m, 5) of such objects.
        found: which of these this network found; the others get a thin coloured box where they are.
    """
    factor = max(SIDE / max(picture.shape[:2]), 1.0)
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    canvas = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    missed = "gained" if found == "lost" else "lost"
    special, colour = found_labels(detections, marks[found])[0], COLOURS[found]
    plain = canvas.copy()
    for detection in detections[~special]:
        _rectangle(canvas, detection[:4] * factor, BLACK, 3)
        _rectangle(canvas, detection[:4] * factor, PALE, 1)  # seen on any ground
    canvas = cv2.addWeighted(canvas, FAINT, plain, 1 - FAINT, 0)
    for row in marks[missed]:
        _rectangle(canvas, row[1:] * factor, COLOURS[missed], 2)
    for detection in detections[special]:
        _rectangle(canvas, detection[:4] * factor, colour, 4)
    for detection in detections[special].flip(0):  # the most confident last, whose caption is then whole
        caption = f"{found}: {label_name(names, int(detection[5]))} {float(detection[4]):.2f}"
        _caption(canvas, caption, detection[:2] * factor, colour)
    return data_uri(canvas)


def _rectangle(canvas: np.ndarray, corners: Tensor, colour: tuple, width: int) -> None:
    left, top, right, bottom = (round(float(value)) for value in corners)
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, width, cv2.LINE_AA)


def _caption(canvas: np.ndarray, text: str, corner: Tensor, colour: tuple) -> None:
    """White letters on a filled ground, inside the picture."""
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
    left = max(min(round(float(corner[0])), canvas.shape[1] - width), 0)
    bottom = max(round(float(corner[1])), height + base)
    cv2.rectangle(canvas, (left, bottom - height - base), (left + width, bottom), colour, -1)
    white = (255, 255, 255)
    cv2.putText(canvas, text, (left, bottom - base + 1), cv2.FONT_HERSHEY_SIMPLEX, 0.5, white, 1, cv2.LINE_AA)


@torch.inference_mode()
def attention_maps(run: RunFiles, dataset: DetectionDataset, images: int = 3) -> list[Attention]:
    """SimAM's attention (mean over channels) of teacher and student at the layers that feed Detect, both of a layer on
    one scale."""
    networks: list[DetectionModel] = [load_network(file)[0].eval() for file in (run.float_weights, run.best_weights)]
    pixels, _, names = pick(dataset, images)
    layers = networks[0].feature_layers
    if networks[1].feature_layers != layers:
        return []
    features = [network(pixels, features=layers)[1] for network in networks]
    found = []
    for index, name in enumerate(names):
        picture = (pixels[index].permute(1, 2, 0).numpy()[..., ::-1] * 255).round().astype(np.uint8)
        item = Attention(name, data_uri(_fitted(picture, cv2.INTER_AREA)), layers, [], [])
        for layer in layers:
            maps = [simam_energy(feature[layer][index]).mean(0).numpy() for feature in features]
            low, high = min(m.min() for m in maps), max(m.max() for m in maps)
            for kept, energy in zip((item.teacher, item.student), maps, strict=True):
                levels = ((energy - low) / max(high - low, 1e-9) * 255).round().astype(np.uint8)
                coloured = cv2.applyColorMap(_fitted(levels, cv2.INTER_NEAREST), cv2.COLORMAP_VIRIDIS)
                kept.append(data_uri(coloured))
        found.append(item)
    return found


def _fitted(image: np.ndarray, interpolation: int, side: int = 160) -> np.ndarray:
    factor = side / max(image.shape[:2])
    size = (max(round(image.shape[1] * factor), 1), max(round(image.shape[0] * factor), 1))
    return cv2.resize(image, size, interpolation=interpolation)
