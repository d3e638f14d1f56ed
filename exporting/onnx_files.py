"""ONNX files: traced, built, verified under a temporary name, and only then named."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from exporting.subject import Subject
from exporting.whole_files import kept_when_whole, refuse_difference
from models.backend import open_session
from quant.export_head import matrix_head
from quant.onnx_graph import DEFAULT_OPSET, INPUT_NAME, INT4_OPSET, ExportedGraph, build, set_metadata, trace, traceable
from quant.onnxruntime_graph import for_onnxruntime
from quant.verify import Reference, Verification, verify
from utils.errors import UserError
from utils.nms import non_max_suppression
from utils.onnx_suppression import COUNT, DECODED, DETECTIONS, add_suppression
from utils.suppression import Suppression

# Pixels, confidences and class numbers that the graph's suppression and ours may differ by.
SUPPRESSION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class OnnxPlan:
    """What an ONNX file is to be like.

    Attributes:
        opset: version of the standard operators.
        int4_weights: weights of at most 4 bits are stored two to a byte.
        batch_size: images per call.
        dynamic: batch, height and width are left open.
        half: 16-bit floats.
        simplify: run onnxslim over the graph.
        suppression: settings of the suppression in the graph, or None.
        own_operators: where convolutions' results are quantized, onnxruntime's own operators may be used.
    """

    opset: int = DEFAULT_OPSET
    int4_weights: bool = False
    batch_size: int = 1
    dynamic: bool = False
    half: bool = False
    simplify: bool = False
    suppression: Suppression | None = None
    own_operators: bool = True

    @property
    def written_opset(self) -> int:
        return max(self.opset, INT4_OPSET) if self.int4_weights else self.opset


class OnnxWriter:
    """Writes the ONNX files of one network; it is traced once for all of them."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._traced: dict[tuple, onnx.ModelProto] = {}

    def build(self, plan: OnnxPlan) -> ExportedGraph:
        """The model in memory, with suppression and metadata.

        Raises:
            UserError: the operators' version is too old, or onnxslim is asked for and missing.
        """
        exported = build(self.trace(plan), plan.written_opset, plan.int4_weights, self.subject.target)
        if self.subject.quantized_results and plan.own_operators and not plan.int4_weights:
            exported = for_onnxruntime(exported)
        if plan.simplify:
            exported.model = simplify(exported)
        metadata = self.subject.metadata
        if plan.suppression is not None:
            exported.model = add_suppression(exported.model, plan.suppression)
            exported.decoded = DECODED
            metadata |= plan.suppression.to_metadata()
        set_metadata(exported.model, metadata)
        return exported

    def trace(self, plan: OnnxPlan) -> onnx.ModelProto:
        """The traced graph that plans of equal shape share, on whatever device the network lies at the first call."""
        # The storage file's convolutions run in float anyway; its head stays as small as it is. With open sizes
        # OpenVINO 2026.4 computes wrong boxes, as if it padded the cells with ones (onnxruntime does not).
        fixed = not plan.dynamic and not plan.int4_weights
        integer_head = fixed and self.subject.quantized and self.subject.target == "onnxruntime"
        key = (plan.opset, plan.batch_size, plan.dynamic, plan.half, integer_head)
        if key not in self._traced:
            folded = self.subject.folded
            model = traceable(matrix_head(folded) if integer_head else folded)
            device = next(iter(folded.parameters()), next(folded.buffers())).device
            example = torch.zeros(plan.batch_size, 3, *self.subject.size, device=device)
            if plan.half:
                model, example = model.half(), example.half()
            self._traced[key] = trace(model, example, plan.opset, plan.dynamic)
        return self._traced[key]


def simplify(exported: ExportedGraph) -> onnx.ModelProto:
    """The model after onnxslim, which folds what is constant at a fixed image size; integer weights stay as they are.

    Raises:
        UserError: onnxslim is not installed.
    """
    try:
        import onnxslim
    except ImportError as error:
        raise UserError("--simplify needs the package onnxslim: pip install onnxslim") from error
    simplified = onnxslim.slim(exported.model)
    tensors = {name for node in simplified.graph.node for name in (*node.input, *node.output)}
    lost = [name for name in exported.codes.values() if name not in tensors]
    if lost:
        raise UserError(f"--simplify: this onnxslim rewrites quantizers ({lost[0]}); export without it")
    return simplified


def write_verified(
    exported: ExportedGraph, target: Path, folded: nn.Module, expected: Iterable[Reference]
) -> Verification:
    """Writes the file under a temporary name, reads it back, compares it with the network, and then names it.

    Raises:
        UserError: it cannot be written, or it does not compute what the network computes.
    """
    expected = list(expected)
    with kept_when_whole(target) as temporary:
        onnx.save_model(exported.model, str(temporary))
        exported.model = onnx.load_model(str(temporary))
        result = verify(folded, exported, expected)
        check_suppression(result, exported, expected)
        refuse_difference(result, target)
    return result


def check_suppression(result: Verification, exported: ExportedGraph, expected: Iterable[Reference]) -> None:
    """Compares the detections of a file that suppresses by itself with ours from its own decoded rows."""
    metadata = {entry.key: entry.value for entry in exported.model.metadata_props}
    settings = Suppression.from_metadata(metadata)
    if settings is None:
        return
    widened = onnx.ModelProto()
    widened.CopyFrom(exported.model)
    widened.graph.output.add().name = DECODED
    session = open_session(widened.SerializeToString(), "the exported graph")
    half = session.get_inputs()[0].type == "tensor(float16)"

    def run(batch: Tensor) -> list[Tensor]:
        feed = {INPUT_NAME: (batch.half() if half else batch).numpy()}
        return [torch.from_numpy(output) for output in session.run([DETECTIONS, COUNT, DECODED], feed)]

    compare_suppression(result, settings, run, expected)


def compare_suppression(
    result: Verification,
    settings: Suppression,
    run: Callable[[Tensor], list[Tensor]],
    expected: Iterable[Reference],
) -> None:
    """Adds a problem for each image of which a file keeps other boxes than ``non_max_suppression`` keeps of its rows.

    Args:
        run: images -> detections (B, n, 6), counts (B,), decoded rows (B, N, 5 + classes).
    """
    for number, reference in enumerate(expected, 1):
        tables, counts, decoded = run(reference.batch)
        wanted = non_max_suppression(
            decoded, settings.confidence, settings.iou, agnostic=settings.agnostic,
            max_detections=settings.max_detections,
        )  # fmt: skip
        for table, count, ours in zip(tables, counts.tolist(), wanted, strict=True):
            found = table[:count]
            equal = found.shape == ours.shape and torch.allclose(found, ours, rtol=0, atol=SUPPRESSION_TOLERANCE)
            if not equal:
                result.problems.append(f"image {number}: the graph's suppression keeps {count} boxes, ours {len(ours)}")
