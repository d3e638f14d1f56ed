"""Measures a detector on a data set.

Usage:
    python val.py --weights runs/train/exp/weights/best.pt --data VOC.yaml --img 640
    python val.py --weights best.onnx --data VOC.yaml --save-json     # or best_openvino_model/, best.torchscript
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backend import Backend, TorchBackend, suppress
from models.combined import open_weights
from models.yolo import Detect, DetectionModel
from utils import distributed
from utils.allocation import keep_freed_memory
from utils.boxes import scale_boxes, split_by_image, xywh_to_xyxy
from utils.coco import CocoResult, category_ids_for, coco_evaluate, detection_rows, ground_truth, image_identifiers
from utils.command import CommandParser, exit_code
from utils.dataset import create_dataloader
from utils.dataset_yaml import DatasetSpec, load_dataset_yaml, prepare_dataset
from utils.devices import select_device
from utils.drawing import plot_images
from utils.errors import UserError
from utils.log import LOGGER
from utils.metrics import (
    IOU_THRESHOLDS,
    ClassMetrics,
    ConfusionMatrix,
    MatchedBoxes,
    ap_per_class,
    fitness,
    match_boxes,
    match_predictions,
    matched_boxes,
)  # fmt: skip
from utils.paths import ROOT, WORK, results_folder
from utils.plots import plot_class_curves, plot_confusion_matrix, plot_study
from utils.progress import progress
from utils.results import newest_weights, save_text
from utils.run_log import LOCALISATION_COLUMNS
from utils.timing import Stopwatch
from utils.voc_metrics import VocEvaluator, VocResult

HEADER = ("%20s%8s%11s" + "%10s" * 4) % ("Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95")
ROW = "%20s%8i%11i" + "%10.3g" * 4
PLOTTED_BATCHES = 3
TASKS = ("val", "test", "train", "speed", "study")
STUDY_SIZES = range(256, 1536 + 128, 128)


@dataclass
class Samples:
    """The detections and labels that an evaluation counted, image by image, for statistics over images.

    Attributes:
        correct: (n, T) bool, from ``match_predictions``.
        scores, predicted: (n,) confidence and class of each detection.
        image: (n,) number of its image, in the loader's order.
        actual: (m,) class of each label.
        label_image: (m,) number of its image.
    """

    correct: np.ndarray
    scores: np.ndarray
    predicted: np.ndarray
    image: np.ndarray
    actual: np.ndarray
    label_image: np.ndarray


@dataclass
class Evaluation:
    """Result of one pass over a data set. precision, recall, map50 and map (mAP50-95) are means over classes."""

    precision: float
    recall: float
    map50: float
    map: float
    per_class: ClassMetrics
    images: int
    instances: int
    losses: tuple[float, float, float] = (0.0, 0.0, 0.0)  # box, objectness, class; zeros without a loss
    speed: dict[str, float] = field(default_factory=dict)  # preprocess, inference, nms: milliseconds per image
    confusion: ConfusionMatrix | None = None
    coco: CocoResult | None = None  # pycocotools' numbers, if it ran
    map75: float = 0.0  # mean over classes, this project's own also where pycocotools ran
    matched: MatchedBoxes = field(default_factory=MatchedBoxes)  # at the confidence of precision and recall
    voc: VocResult | None = None  # PASCAL VOC's own scores, if they were asked for
    samples: Samples | None = None

    @property
    def fitness(self) -> float:
        """What the best epoch is chosen by."""
        return fitness(self.map50, self.map)

    @property
    def localisation(self) -> dict[str, float]:
        """mAP75 and the numbers of matched boxes by their names in results.csv."""
        values = (self.map75, self.matched.share, self.matched.mean_iou, self.matched.class_accuracy)
        return dict(zip(LOCALISATION_COLUMNS, values, strict=True))

    def map_by_class(self, num_classes: int) -> np.ndarray:
        """(num_classes,) mAP50-95 of each class; classes without labels get the mean."""
        values = np.full(num_classes, self.map)
        values[self.per_class.classes] = self.per_class.ap50_95
        return values


@dataclass
class OutputOptions:
    """What an evaluation writes besides its numbers; all paths lie in ``folder``."""

    folder: Path | None = None
    plots: bool = False
    text: bool = False  # labels/<stem>.txt
    confidence: bool = False  # a sixth column in them
    hybrid: bool = False  # the labels themselves take part in suppression: for relabelling a data set
    json: Path | None = None  # file for the detections in COCO's format
    annotations: Path | None = None  # COCO's own annotations; without them they are made from the labels
    coco_numbers: bool = False  # categories by COCO's numbers
    voc: bool = False  # PASCAL VOC's scores beside the others


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor | tuple],
    loader: Iterable,
    *,
    names: Mapping[int, str],
    device: torch.device,
    confidence_threshold: float = 0.001,
    iou_threshold: float = 0.6,
    max_detections: int = 300,
    single_class: bool = False,
    loss: Callable | None = None,
    output: OutputOptions | None = None,
    verbose: bool = False,
    report: bool = True,
    sharded: bool = False,
) -> Evaluation:
    """Runs ``model`` over ``loader`` and measures it.

    Args:
        model: takes images (B, 3, H, W) in 0..1 and returns decoded rows (B, N, 5 + classes), or these and the raw
            maps. A module is put into eval mode for the time being. A backend whose file suppresses by itself returns
            detections.
        loader: batches of images (B, 3, H, W) uint8, targets (n, 6), paths and shapes, from ``create_dataloader``.
        names: class names by index.
        single_class: every label and detection counts as class 0.
        loss: a ``DetectionLoss``; its parts are averaged over batches if the model returns raw maps.
        verbose: print one line per class too.
        report: print the table.
        sharded: whether each process of a job has every n-th image (``EpochSampler``); all get the whole's result.
    """
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    output = output or OutputOptions()
    collector = _Collector(names, device, single_class, output)
    watches = {name: Stopwatch(device) for name in ("preprocess", "inference", "nms")}
    losses, batches = torch.zeros(3, device=device), 0
    head, suppression = _head(model), getattr(model, "suppression", None)
    for images, targets, paths, shapes in progress(loader, "validation"):
        with watches["preprocess"]:
            images, targets = _to_device(model, images, device), targets.to(device).clone()
        with watches["inference"], _undecoded(head):
            outcome = model(images)
            decoded, raw = outcome if isinstance(outcome, tuple | list) else (outcome, None)
        if loss is not None and raw is not None:
            losses += loss(raw, targets)[1]
        height, width = images.shape[2:]
        targets[:, 2:] *= torch.tensor((width, height, width, height), device=device)
        hybrid = split_by_image(targets, len(images)) if output.hybrid else ()
        with watches["nms"]:
            rows = decoded if head is None else head.confident_rows(raw, confidence_threshold)
            detections = suppress(
                rows, suppression, confidence_threshold, iou_threshold, multi_label=True, agnostic=single_class,
                labels=hybrid, max_detections=max_detections,
            )  # fmt: skip
        collector.add(images.shape[2:], targets, detections, paths, shapes)
        if output.plots and batches < PLOTTED_BATCHES and distributed.is_main():
            _plot_batch(batches, images, targets, detections, paths, names, output.folder)
        batches += 1
    if was_training:
        model.train()
    sums = torch.cat((losses, losses.new_tensor([batches])))
    images = max(collector.images, 1)
    if sharded:
        sums = distributed.total(sums)
        collector.merge()
        result = distributed.from_main(collector.finish)
    else:
        result = collector.finish()
    result.losses = tuple((sums[:3] / sums[3].clamp(min=1)).tolist())
    result.speed = {name: watch.total / images * 1e3 for name, watch in watches.items()}
    if report:
        log_table(result, names, verbose)
    if output.json is not None:
        collector.run_coco(result)
    return result


def _head(model: object) -> Detect | None:
    """The head of a PyTorch network, from which only confident rows are taken; None for a model of another kind."""
    network = model.model if isinstance(model, TorchBackend) else model
    return network.detect if isinstance(network, DetectionModel) else None


@contextmanager
def _undecoded(head: Detect | None) -> Iterator[None]:
    if head is None:
        yield
        return
    before, head.decodes = head.decodes, False
    try:
        yield
    finally:
        head.decodes = before


def _to_device(model: object, images: Tensor, device: torch.device) -> Tensor:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    images = images.to(device, non_blocking=True)
    dtype = torch.float32 if parameter is None else parameter.dtype
    return images / 255 if images.is_floating_point() else images.to(dtype).div_(255)


class _Collector:
    """Gathers what is needed for the metrics, image by image."""

    def __init__(self, names: Mapping[int, str], device: torch.device, single: bool, output: OutputOptions) -> None:
        self.names, self.single_class, self.output = names, single, output
        self.thresholds = torch.tensor(IOU_THRESHOLDS, device=device)
        self.confusion = ConfusionMatrix(len(names))
        self.correct, self.scores, self.predicted, self.actual = [], [], [], []
        self.overlap, self.right_class = [], []
        self.keep = output.json is not None
        self.voc = VocEvaluator(single) if output.voc else None
        self.kept: list[tuple[str, tuple[int, int], Tensor, Tensor]] = []  # path, size, detections, labels
        self.images = 0
        if output.text and output.folder is not None:
            (output.folder / "labels").mkdir(parents=True, exist_ok=True)

    def add(self, size: tuple[int, int], targets: Tensor, detections: list[Tensor], paths: list, shapes: list) -> None:
        """Takes one batch; targets in pixels of the network's input."""
        labelled = split_by_image(targets, len(detections))
        for index, (found, mine) in enumerate(zip(detections, labelled, strict=True)):
            native_size, ratio_pad = shapes[index]
            found = found.clone()
            if self.single_class:
                found[:, 5] = 0
            found[:, :4] = scale_boxes(size, found[:, :4], native_size, ratio_pad)
            corners = scale_boxes(size, xywh_to_xyxy(mine[:, 1:5]), native_size, ratio_pad)
            labels = torch.cat((mine[:, :1], corners), 1)

            self.correct.append(match_predictions(found, labels, self.thresholds).cpu())
            overlap, right_class = match_boxes(found, labels)
            self.overlap.append(overlap.cpu())
            self.right_class.append(right_class.cpu())
            self.scores.append(found[:, 4].cpu())
            self.predicted.append(found[:, 5].cpu())
            self.actual.append(labels[:, 0].cpu())
            if self.output.plots:
                self.confusion.add(found, labels)
            if self.output.text:
                save_text(self.output.folder / "labels", paths[index], found, native_size, self.output.confidence)
            if self.voc:
                self.voc.add_file(paths[index], native_size, found, labels)
            if self.keep:
                self.kept.append((str(paths[index]), tuple(native_size), found.cpu(), labels.cpu()))
        self.images += len(detections)

    def merge(self) -> None:
        """Puts the images of all processes into the main one, in the order in which one alone would have seen them."""
        names = ("correct", "scores", "predicted", "actual", "overlap", "right_class")
        mine = {name: [part.numpy() for part in getattr(self, name)] for name in names}
        shares = distributed.gather((mine, self.confusion.matrix, self.images))
        if shares is None or len(shares) == 1:
            return
        for name in names:
            turns = itertools.zip_longest(*(share[name] for share, _, _ in shares))
            setattr(self, name, [torch.from_numpy(part) for turn in turns for part in turn if part is not None])
        self.confusion.matrix = sum(matrix for _, matrix, _ in shares)
        self.images = sum(images for _, _, images in shares)

    def finish(self) -> Evaluation:
        """Computes the metrics and draws the charts."""
        gathered = (self.correct, self.scores, self.predicted, self.actual, self.overlap, self.right_class)
        if self.images:
            correct, scores, predicted, actual, overlap, right_class = (torch.cat(parts).numpy() for parts in gathered)
        else:
            correct = np.zeros((0, len(IOU_THRESHOLDS)), dtype=bool)
            scores = predicted = actual = overlap = right_class = np.zeros(0)
        per_class = ap_per_class(correct, scores, predicted, actual)
        result = Evaluation(*per_class.means(), per_class, self.images, len(actual), confusion=self.confusion)
        result.voc = self.voc.finish() if self.voc else None
        result.map75 = float(per_class.ap75.mean()) if len(per_class.classes) else 0.0
        result.matched = matched_boxes(overlap, right_class, scores, len(actual), per_class.confidence)
        image, label_image = (np.repeat(np.arange(self.images), [len(p) for p in parts]) for parts in gathered[1:4:2])
        result.samples = Samples(correct, scores, predicted, image, actual, label_image)
        if self.output.plots:
            plot_class_curves(per_class, self.names, self.output.folder)
            labels = [self.names[i] for i in sorted(self.names)]
            plot_confusion_matrix(self.confusion.matrix, labels, self.output.folder / "confusion_matrix.png")
        return result

    def run_coco(self, result: Evaluation) -> None:
        """Writes the JSON file and evaluates it; COCO's own annotations decide over the result's mAP."""
        identifiers = image_identifiers([entry[0] for entry in self.kept])
        categories = category_ids_for(self.names, self.output.coco_numbers)
        rows, sizes, labels = [], {}, {}
        for path, size, found, truth in self.kept:
            image_id = identifiers[path]
            rows.extend(detection_rows(found, image_id, categories))
            sizes[image_id], labels[image_id] = size, truth.numpy()
        self.output.json.write_text(json.dumps(rows), encoding="utf-8")
        if self.output.annotations is None and not any(map(len, labels.values())):
            LOGGER.info(f"{self.output.json} has the detections; there is nothing to measure them by")
            return
        LOGGER.info(f"Evaluating {self.output.json} with pycocotools...")
        annotations = self.output.annotations or ground_truth(sizes, labels, self.names, categories)
        result.coco = coco_evaluate(annotations, rows, list(sizes))
        if self.output.annotations is not None:
            result.map, result.map50 = result.coco[:2]


def _plot_batch(
    number: int, images: Tensor, targets: Tensor, detections: list[Tensor], paths: list, names: Mapping, folder: Path
) -> None:
    labels = torch.cat((targets[:, :2], xywh_to_xyxy(targets[:, 2:])), 1)
    plot_images(images, labels, paths, folder / f"val_batch{number}_labels.jpg", names)
    numbered = [torch.cat((found.new_full((len(found), 1), i), found), 1) for i, found in enumerate(detections)]
    rows = torch.cat(numbered)[:, [0, 6, 1, 2, 3, 4, 5]]
    plot_images(images, rows, paths, folder / f"val_batch{number}_pred.jpg", names)


def log_table(result: Evaluation, names: Mapping[int, str], verbose: bool) -> None:
    """Prints the line of all classes and, if ``verbose``, one per class; then what tells localisation and
    classification apart."""
    means = (result.precision, result.recall, result.map50, result.map)
    LOGGER.info(HEADER)
    LOGGER.info(ROW % ("all", result.images, result.instances, *means))
    if not result.instances:
        LOGGER.warning(
            "WARNING: no labels found, so nothing can be measured. Label files lie in 'labels' where the images lie in "
            "'images'"
        )
    table = result.per_class
    if verbose and len(names) > 1:
        rows = zip(table.classes, table.labels, table.precision, table.recall, table.ap50, table.ap50_95, strict=True)
        for label, *values in rows:
            LOGGER.info(ROW % (names[int(label)], result.images, *values))
    matched = result.matched
    LOGGER.info(
        f"mAP75 {result.map75:.3f}; boxes matched at IoU 0.5, any class, confidence {matched.confidence:.3f} or more: "
        f"{matched.share:.1%} of labels, mean IoU {matched.mean_iou:.4f}, class accuracy {matched.class_accuracy:.4f}"
    )
    for line in result.voc.lines(names, verbose) if result.voc else ():
        LOGGER.info(line)


def _check_ranges(options: argparse.Namespace) -> None:
    """Raises UserError for a number that means nothing, before anything is loaded."""
    for flag in ("conf_thres", "iou_thres"):
        if not 0 <= getattr(options, flag) <= 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: a number from 0 to 1 is needed")
    if options.dnn:
        raise UserError("--dnn: ONNX files run in onnxruntime, not in OpenCV: leave the flag out")
    for flag in ("batch_size", "max_det", "imgsz"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: at least 1 is needed")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; abbreviations such as --batch, --conf and --iou are allowed."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--data", default=str(ROOT / "data" / "shapes.yaml"), help="dataset YAML")
    parser.add_argument("--weights", nargs="+", default=None, help=".pt, .onnx, .torchscript, OpenVINO; newest best.pt")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch")
    parser.add_argument("--imgsz", "--img", "--img-size", type=int, default=None, help="long side in pixels (640)")
    parser.add_argument("--conf-thres", type=float, default=0.001, help="confidence threshold")
    parser.add_argument("--iou-thres", type=float, default=0.6, help="IoU threshold of the suppression")
    parser.add_argument("--max-det", type=int, default=300, help="detections kept per image")
    parser.add_argument("--task", default="val", choices=TASKS, help="split; speed: time; study: sizes 256 to 1536")
    parser.add_argument("--device", default="", help="cuda device, such as 0, or cpu")
    parser.add_argument("--workers", type=int, default=8, help="loader processes; one where the CPU computes")
    parser.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    parser.add_argument("--verbose", action="store_true", help="print one line per class")
    parser.add_argument("--save-txt", action="store_true", help="write detections as label files")
    parser.add_argument("--save-hybrid", action="store_true", help="write labels and detections merged; no real mAP")
    parser.add_argument("--save-conf", action="store_true", help="add confidences to the label files")
    parser.add_argument("--save-json", action="store_true", help="write COCO JSON and evaluate it with pycocotools")
    parser.add_argument("--noplots", action="store_true", help="draw nothing")
    parser.add_argument("--project", default=str(WORK / "runs" / "val"), help="results go to project/name")
    parser.add_argument("--name", default="exp", help="name of the run")
    parser.add_argument("--exist-ok", action="store_true", help="write into an existing project/name")
    parser.add_argument("--augment", action="store_true", help="three passes: mirrored and smaller too")
    parser.add_argument("--half", action="store_true", help="16-bit floats: on CUDA, and in OpenVINO")
    parser.add_argument("--dnn", action="store_true", help="refused: ONNX files run in onnxruntime")
    parser.add_argument("--square", action="store_true", help="pad to squares, the only shape a fixed-size ONNX takes")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Evaluation | list[Evaluation]:
    """Does what the command line asks for; tasks speed and study return one result per file and size."""
    _check_ranges(options)
    device = select_device(options.device)
    spec = load_dataset_yaml(options.data)
    prepare_dataset(spec)
    files = options.weights or [newest_weights()]
    size = options.imgsz or int(spec.defaults.get("imgsz", 640))
    if options.task == "study":
        return study(options, spec, files, device)
    if options.task == "speed":
        options.conf_thres, options.iou_thres, options.save_json = 0.25, 0.45, False
        return [run_file([file], options, spec, size, device) for file in files]
    if options.conf_thres > 0.001:
        LOGGER.warning(f"--conf-thres {options.conf_thres} > 0.001 cuts the precision-recall curve: mAP will be lower")
    return run_file(files, options, spec, size, device)


def _compare_names(file: str | Path, trained: Mapping[int, str], data: str | Path, named: Mapping[int, str]) -> None:
    """Warns where the classes of the weights have other names than the data set's: they are matched by number."""
    placeholders = {index: (str(index), f"class{index}") for index in trained}  # of networks that were given no names
    pairs = [(i, name, named[i]) for i, name in trained.items() if i in named and name not in placeholders[i]]
    other = [pair for pair in pairs if pair[1].casefold() != pair[2].casefold()]
    if other:
        index, ours, theirs = other[0]
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        LOGGER.warning(
            f"WARNING: class {index} is {ours!r} in {file} and {theirs!r} in {data}{more}: they are matched by number"
        )


def run_file(
    files: Sequence[str | Path], options: argparse.Namespace, spec: DatasetSpec, image_size: int, device: torch.device
) -> Evaluation:
    """Measures one weights file, or an ensemble of several, at one image size."""
    file, backend = files[0], open_weights(files, device, options.data, options.half, options.augment)
    _check_suppression(backend, options)
    names = {0: "item"} if options.single_cls else spec.names
    if not options.single_cls and backend.nc != len(spec.names):
        raise UserError(
            f"{file} detects {backend.nc} classes, {options.data} names {len(spec.names)}: give weights trained on it"
        )
    if not options.single_cls:
        _compare_names(file, backend.names, options.data, spec.names)
    rect, batch_size = options.task != "speed" and not options.square, options.batch_size
    if backend.fixed_size:
        height, width = backend.fixed_size
        if height != width:
            raise UserError(f"{file} takes images of {height}x{width}: val.py needs a square or dynamic input")
        if options.imgsz and image_size != height:
            LOGGER.warning(f"{file} was exported for {height}x{width} pixels: --imgsz {options.imgsz} does not apply")
        image_size, rect = height, False
    else:
        image_size = -(-image_size // backend.stride) * backend.stride
    if backend.fixed_batch:
        batch_size = backend.fixed_batch
    split = options.task if options.task in ("train", "test") else "val"
    # Where the network computes on the same processors, one worker keeps ahead of it, and more take its time.
    workers = min(options.workers, 1) if device.type == "cpu" else options.workers
    loader, _dataset = create_dataloader(
        spec.split(split), image_size, batch_size, rect=rect, pad=0.5 if rect else 0.0, stride=backend.stride,
        single_class=options.single_cls, workers=workers, prefix=split, num_classes=len(spec.names),
    )  # fmt: skip
    output = _output_options(file, options, spec)
    result = evaluate(
        backend, loader, names=names, device=device, confidence_threshold=options.conf_thres,
        iou_threshold=options.iou_thres, max_detections=options.max_det, single_class=options.single_cls,
        output=output, verbose=options.verbose or len(names) < 50,
    )  # fmt: skip
    shape = (batch_size, 3, image_size, image_size)
    speed = result.speed
    LOGGER.info(
        f"Speed: {speed['preprocess']:.1f}ms pre-process, {speed['inference']:.1f}ms inference, "
        f"{speed['nms']:.1f}ms NMS per image at shape {shape}"
    )
    LOGGER.info(f"Results saved to {output.folder}")
    return result


def _check_suppression(backend: Backend, options: argparse.Namespace) -> None:
    """Says what a file with suppression in its graph leaves out; raises UserError where it cannot be measured."""
    own = backend.suppression
    if own is None:
        return
    if options.save_hybrid:
        raise UserError(
            f"--save-hybrid: {backend.path} suppresses boxes itself, labels cannot take part; export it without --nms"
        )
    cut = [f"confidence above {own.confidence:g}"] if own.confidence > options.conf_thres else []
    cut += [f"IoU {own.iou:g} instead of {options.iou_thres:g}"] if own.iou != options.iou_thres else []
    LOGGER.warning(
        f"{backend.path} suppresses boxes itself: one class for each box{''.join(f', {text}' for text in cut)}. "
        "Its mAP is lower than that of the same network with suppression outside"
    )


def _output_options(file: str | Path, options: argparse.Namespace, spec: DatasetSpec) -> OutputOptions:
    folder = results_folder(options.project, options.name, options.exist_ok)
    is_coco = spec.is_coco or str(options.data).endswith("coco.yaml")
    wants_json = (options.save_json or is_coco) and options.task != "speed"
    return OutputOptions(
        folder=folder,
        plots=not options.noplots,
        text=options.save_txt or options.save_hybrid,
        confidence=options.save_conf,
        hybrid=options.save_hybrid,
        json=folder / f"{Path(file).stem}_predictions.json" if wants_json else None,
        annotations=_annotations(spec, options.task) if is_coco else None,
        coco_numbers=is_coco,
        voc=spec.evaluation == "voc",
    )


def _annotations(spec: DatasetSpec, task: str) -> Path | None:
    """COCO's own annotations of the images that ``task`` measures, where they are there; test images have none."""
    split = task if task in ("train", "test") else "val"
    names = [Path(spec.split(split)[0]).stem] + ["val2017"] * (split == "val")
    files = (Path(spec.path) / "annotations" / f"instances_{name}.json" for name in names)
    return next((file for file in files if file.is_file()), None)


def study(
    options: argparse.Namespace, spec: DatasetSpec, files: list[str | Path], device: torch.device
) -> list[Evaluation]:
    """Sweeps the image size; writes ``study_<data>_<weights>.txt`` with one row per size, and ``study.png``."""
    folder = results_folder(options.project, options.name, options.exist_ok)
    options.name, options.exist_ok = folder.name, True  # one folder for all sizes
    options.save_json, options.noplots = False, True
    results, curves = [], {}
    for file in files:
        rows = []
        for size in STUDY_SIZES:
            result = run_file([file], options, spec, size, device)
            results.append(result)
            speed = [result.speed[key] for key in ("preprocess", "inference", "nms")]
            rows.append([size, result.precision, result.recall, result.map50, result.map, *speed])
        label = Path(file).stem if Path(file).stem not in curves else f"{Path(file).stem}{len(curves) + 1}"
        curves[label] = np.array(rows)
        name = f"study_{Path(options.data).stem}_{label}.txt"
        header = "size precision recall mAP50 mAP50-95 preprocess_ms inference_ms nms_ms"
        np.savetxt(folder / name, rows, fmt="%10.4g", header=header)
    plot_study(curves, folder / "study.png")
    LOGGER.info(f"Study saved to {folder}")
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    keep_freed_memory()
    return exit_code("val.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
