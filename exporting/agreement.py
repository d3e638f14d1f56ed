"""``export.py --verify``: do the files find on the user's data what the network finds?

Both are measured on the same letterboxed images, and the files' codes are compared layer by layer (see
``quant.verify``). A file agrees if every code that differs stands at a rounding boundary, and its mAP50 and mAP50-95
are within ``MAP_TOLERANCE`` of the network's or within what chance explains.

Chance is there because a code that lies on a boundary falls to either side with the order in which a runtime adds up a
convolution, and at 4 bits and fewer the layers behind multiply such a flip. A network that had trained for 3 epochs at
4 bits differed from itself, batch norms folded or not, by 0.014 mAP50 on 87 images of blood cells. So images are drawn
again with replacement, for both sides alike, and the spread of the difference is its standard error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

import val
from exporting.onnx_files import OnnxPlan, OnnxWriter
from exporting.pictures import verification_images
from exporting.subject import Subject
from models.backend import Backend, OnnxBackend, load_backend, suppress
from models.openvino_backend import OpenVinoBackend, in_openvino
from quant.onnx_graph import ExportedGraph
from quant.verify import Runtime, Verification, in_onnxruntime, references, shortened, verify, verify_outputs
from utils.dataset import create_dataloader
from utils.dataset_yaml import DatasetSpec, load_dataset_yaml, prepare_dataset
from utils.errors import UserError
from utils.metrics import ap_per_class
from utils.progress import progress
from utils.suppression import Suppression

MAP_TOLERANCE = 0.002
# A difference beyond so many standard errors is not chance: 3 in 1000 by the normal distribution.
STANDARD_ERRORS = 3
RESAMPLES = 100
# Images whose codes are compared layer by layer, evenly spaced over the data.
CODE_IMAGES = 16
BATCH_SIZE = 8
LEAST_STRIDE = 32
CONFIDENCE, IOU, MAX_DETECTIONS = 0.001, 0.6, 300  # as val.py


@dataclass
class Agreement:
    """How one file compares with the network on a data set."""

    path: Path
    map50: float
    map: float
    reference_map50: float
    reference_map: float
    error: float  # standard error of the larger difference over redrawn images
    codes: Verification | None = None  # what a look inside found, or at the outputs alone; None where neither works
    problems: list[str] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """The larger one of the two differences in mAP, with its sign."""
        return max(self.map50 - self.reference_map50, self.map - self.reference_map, key=abs)

    @property
    def allowed(self) -> float:
        return max(MAP_TOLERANCE, STANDARD_ERRORS * self.error)


def compare_on_data(subject: Subject, files: Sequence[Path], data: str) -> list[Agreement]:
    """Measures exported files and the network they were made of on the val split of a data set.

    Raises:
        UserError: the data set cannot be read or has other classes, or a file takes images that are not square.
    """
    spec = load_dataset_yaml(data)
    prepare_dataset(spec)
    if len(spec.names) != subject.trained.nc:
        raise UserError(f"{subject.path} detects {subject.trained.nc} classes, {data} names {len(spec.names)}")
    ours = load_backend(subject.path)
    measured: dict[tuple, val.Evaluation] = {}
    results = []
    for path in files:
        backend = load_backend(path, data=data)
        size = backend.fixed_size or subject.size
        if size[0] != size[1]:
            raise UserError(f"{path} takes images of {size[0]}x{size[1]}: --verify needs a square or dynamic input")
        # As train.py's: a head may have smaller strides than the network behind it.
        shape = size[0], backend.fixed_size is None, max(backend.stride, LEAST_STRIDE)
        key = shape, backend.suppression
        if key not in measured:
            measured[key] = _measure(_SameSuppression(ours, backend.suppression), spec, *shape, BATCH_SIZE)
        reference = measured[key]
        result = _measure(backend, spec, *shape, backend.fixed_batch or BATCH_SIZE)
        found = judge(path, reference, result)
        found.problems += other_network(path, subject.metadata, backend.metadata)
        found.codes = compare_codes(replace(subject, size=size), backend, data)
        if found.codes is not None:
            found.problems += [f"{path}: {problem}" for problem in found.codes.problems]
        results.append(found)
    return results


def other_network(path: Path, ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Problems of a file that says another method or other bits than the checkpoint: it was made of another network,
    which accuracy on few images and outputs alone cannot always tell. Other people's files say neither."""
    return [
        f"{path}: made of another network, its {key} is {theirs[key]} and the checkpoint's {ours[key]}"
        for key in ("method", "bits")
        if key in theirs and theirs[key] != ours[key]
    ]


class _SameSuppression:
    """The network with the suppression that a file has in its graph."""

    def __init__(self, backend: Backend, suppression: Suppression | None) -> None:
        self.backend, self.suppression = backend, suppression

    def __call__(self, images: torch.Tensor):
        decoded, raw = self.backend(images)
        own = self.suppression
        if own is None:
            return decoded, raw
        kept = suppress(
            decoded, None, own.confidence, own.iou, agnostic=own.agnostic, max_detections=own.max_detections
        )
        return kept, None


def _measure(model: object, spec: DatasetSpec, side: int, rect: bool, stride: int, batch_size: int) -> val.Evaluation:
    """Accuracy on the val split; with ``rect`` images of equal proportions share a batch, as in val.py."""
    loader, _ = create_dataloader(
        spec.val, side, batch_size, rect=rect, pad=0.5 if rect else 0.0, stride=stride, workers=0, prefix="val",
        num_classes=len(spec.names),
    )  # fmt: skip
    return val.evaluate(
        model, loader, names=spec.names, device=torch.device("cpu"), confidence_threshold=CONFIDENCE,
        iou_threshold=IOU, max_detections=MAX_DETECTIONS, report=False,
    )  # fmt: skip


def judge(path: Path, reference: val.Evaluation, result: val.Evaluation) -> Agreement:
    """Compares a file's accuracy with the network's on the same images."""
    errors = standard_errors(reference, result)
    larger = abs(result.map - reference.map) > abs(result.map50 - reference.map50)
    found = Agreement(path, result.map50, result.map, reference.map50, reference.map, errors[int(larger)])
    if not abs(found.difference) <= found.allowed:
        found.problems.append(f"{path}: mAP differs by {found.difference:+.4f}, {found.allowed:.4f} is allowed")
    return found


def standard_errors(ours: val.Evaluation, theirs: val.Evaluation, seed: int = 0) -> tuple[float, float]:
    """Standard deviations of the differences in mAP50 and mAP50-95 over ``RESAMPLES`` draws of as many images."""
    generator = np.random.default_rng(seed)
    differences = []
    for _ in progress(range(RESAMPLES), "drawing images again"):
        times = generator.multinomial(ours.images, np.full(ours.images, 1 / ours.images))
        differences.append(np.subtract(_drawn(theirs.samples, times), _drawn(ours.samples, times)))
    map50, map50_95 = np.std(differences, axis=0, ddof=1).tolist()
    return map50, map50_95


def _drawn(samples: val.Samples, times: np.ndarray) -> tuple[float, float]:
    """mAP50 and mAP50-95 with image i counted ``times[i]`` times."""
    rows = np.repeat(np.arange(len(samples.image)), times[samples.image])
    labels = np.repeat(np.arange(len(samples.label_image)), times[samples.label_image])
    per_class = ap_per_class(
        samples.correct[rows], samples.scores[rows], samples.predicted[rows], samples.actual[labels]
    )
    return per_class.means()[2:4]


def compare_codes(subject: Subject, backend: Backend, data: str) -> Verification | None:
    """Layer by layer where inner tensors can be seen (ONNX, OpenVINO), by the outputs alone elsewhere.

    Which tensor holds the codes of which layer is not in the file. The graph is built once more, which gives the same
    names, and the file takes its place.

    Returns:
        None where neither works: suppression in a file whose inner tensors are not those that this version writes.
    """
    images, _ = verification_images(data, subject.weights, subject.size, CODE_IMAGES)
    trained = subject.trained if subject.quantized else None
    batch_size = backend.fixed_batch or 1
    expected = (found for image in images for found in references(subject.folded, [image], batch_size, trained))
    graph, runtime = _inside(subject, backend)
    if graph is not None:
        return verify(subject.folded, graph, expected, runtime)
    if backend.suppression is not None:
        return None
    return verify_outputs(lambda batch: backend(batch)[0], expected, subject.quantized, getattr(backend, "half", False))


def _inside(subject: Subject, backend: Backend) -> tuple[ExportedGraph | None, Runtime | None]:
    """The graph that a file was made of, as far as it can be told, and what runs the file."""
    plan = OnnxPlan(
        batch_size=backend.fixed_batch or 1, dynamic=backend.fixed_batch is None, suppression=backend.suppression
    )
    if isinstance(backend, OpenVinoBackend) and not backend.half:
        graph, runtime = OnnxWriter(subject).build(plan), in_openvino(backend.path)
    elif isinstance(backend, OnnxBackend) and not backend.half:
        model = onnx.load_model(str(backend.path))
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        int4 = any(tensor.data_type == TensorProto.INT4 for tensor in model.graph.initializer)
        graph = OnnxWriter(subject).build(replace(plan, opset=opset, int4_weights=int4))
        graph.model, runtime = model, in_onnxruntime(model)
    else:
        return None, None
    try:
        runtime([graph.decoded, *graph.codes.values(), *(place.source for place in graph.quantizers)])
    except UserError:
        return None, None
    return graph, runtime


def _problems(result: Agreement) -> list[str]:
    return shortened(result.problems, f"{result.path}: ")


def table(subject: Subject, results: Sequence[Agreement], data: str) -> str:
    """A few readable lines: accuracy of the network and of each file, and what was found inside."""
    width = max(len(str(result.path)) for result in results)
    lines = [f"On the val images of {data}:"]
    lines.append(f"  {'':<{width}}   mAP50 mAP50-95   the network's   difference (chance)")
    for result in results:
        verdict = "does not hold" if result.problems else "holds"
        lines.append(
            f"  {result.path!s:<{width}}  {result.map50:.4f}   {result.map:.4f}  {result.reference_map50:.4f} "
            f"{result.reference_map:.4f}    {result.difference:+.4f} (+-{result.error:.4f})  {verdict}"
        )
    for result in results:
        if result.codes is not None:
            lines.append(f"{result.path}, {result.codes.images} of these images:\n{result.codes.counts()}")
        else:
            lines.append(f"{result.path}: only its mAP was compared, its layers are not those that this version writes")
    lines += [f"PROBLEM: {problem}" for result in results for problem in _problems(result)]
    return "\n".join(lines)
