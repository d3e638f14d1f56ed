"""Does an exported file compute what the network computes? Three questions, answered by running both.

1. Quantizers: our grid, given the float tensor the runtime gave its own QuantizeLinear, yields the same codes.
2. Layers: our network, in which every quantizer hands on the runtime's codes instead of its own, arrives at the
   runtime's codes at the next quantizer. So each layer is judged by what it does with the runtime's own input, and
   rounding in one layer cannot excuse a difference in a later one.
3. End to end: both run freely. Here one flipped code may change many behind it, hence images are counted that come
   through without any, and their outputs must agree.

A code may differ only where the value in front of the rounding lies on a boundary between two codes, but for float
rounding. In question 1 both sides divide the same float by the same step: within ``QUANTIZER_TOLERANCE`` steps (more
where float32 itself is coarser). In
question 2 each side has added up a convolution in its own order: ``LAYER_TOLERANCE`` of the largest value of the
tensor, in steps.

The codes of questions 2 and 3 come from a session that returns nothing but codes. One that also returns the floats in
front of the quantizers, which question 1 needs, could not run any convolution in integers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, nn

from models.backend import open_session
from quant.fold import ActivationGrid
from quant.onnx_graph import INPUT_NAME, ExportedGraph, call_name
from utils.progress import progress

QUANTIZER_TOLERANCE = 1e-5  # steps; with more than 42 levels the two float32 spacings that follow are more
FLOAT_SPACING = 2**-23  # relative: a quotient of 255 is known to 1.5e-5, and runtimes multiply by the inverse
LAYER_TOLERANCE = 1e-5
# Absolute and relative difference of outputs (pixels, probabilities) that 32-bit float rounding explains.
OUTPUT_TOLERANCE = 1e-4
# Relative L2 distance of an image's boxes, and of its scores, that 16-bit floats explain. yolov5n's are up to 0.002 and
# 0.011. Single boxes cannot be held to a limit: where no object is they move by up to 3.5 pixels.
HALF_DISTANCE = 0.03
# Relative L2 distance beyond which flipped codes no longer explain that outputs differ. Flips multiply from layer to
# layer until the rounding noise of both sides is unrelated, which is 1 % at 8 bits and tens of percent at 2.
GROSS_DIFFERENCE = 0.5
SHOWN_PROBLEMS = 5


@dataclass
class CodeCount:
    """Codes compared, codes that differ, and those of them that no rounding boundary explains."""

    compared: int = 0
    different: int = 0
    unexplained: int = 0
    worst: float = 0.0  # largest distance from a boundary among the differing codes, in units of what is allowed
    farthest: float = 0.0  # largest distance from a boundary among the explained ones, in steps
    where: dict[str, int] = field(default_factory=dict)  # quantizer -> unexplained codes

    def add(self, name: str, grid: ActivationGrid, x: Tensor, theirs: Tensor, allowed: float) -> None:
        """Compares our codes of ``x`` with the runtime's; ``allowed`` is a distance from a boundary in steps."""
        ours = grid.codes(x)
        self.compared += ours.numel()
        differs = ours != theirs
        if not bool(differs.any()):
            return
        distance = grid.distance(x[differs], ours[differs], theirs[differs].to(ours.dtype)) / allowed
        unexplained = int((distance > 1).sum())
        self.different += distance.numel()
        self.unexplained += unexplained
        self.worst = max(self.worst, float(distance.max()))
        self.farthest = max([self.farthest, *(distance[distance <= 1] * allowed).tolist()])
        if unexplained:
            self.where[name] = self.where.get(name, 0) + unexplained


@dataclass
class Reference:
    """What the network makes of one image: computed once, compared with every file.

    Attributes:
        batch: the image (B, 3, H, W), repeated as often as the file takes images.
        decoded: the folded network's output (B, N, 5 + classes).
        codes: each call of an ``ActivationGrid`` -> its codes.
        trained: the output of the network before folding, or None.
    """

    batch: Tensor
    decoded: Tensor
    codes: dict[str, Tensor]
    trained: Tensor | None = None


@dataclass
class Verification:
    """What ``verify`` found; ``holds`` says whether the file may be used."""

    images: int = 0
    quantizers: CodeCount = field(default_factory=CodeCount)
    layers: CodeCount = field(default_factory=CodeCount)
    without_flip: int = 0
    largest_difference: float = 0.0  # of any output value, over images without a flip
    largest_relative: float = 0.0  # L2 distance / L2 norm, over all images
    trained_relative: float | None = None  # the same against the network before folding
    trained_equal: int = 0  # images on which that network and the file agree but for float rounding
    problems: list[str] = field(default_factory=list)
    quantized: bool = True
    inside: bool = True  # whether codes were compared, not outputs only
    half: bool = False  # the file computes in 16 bits

    @property
    def holds(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        """The verdict in a few words."""
        if self.problems:
            return f"{len(self.problems)} problems"
        if self.quantized and self.inside:
            codes = self.quantizers.compared + self.layers.compared
            flipped = self.quantizers.different + self.layers.different
            return f"{codes:,} codes equal" + (f" but {flipped:,} at rounding boundaries" if flipped else "")
        if self.half:
            return f"outputs in 16 bits, relative distance {self.largest_relative:.1g}"
        return f"outputs within {self.largest_difference if self.without_flip else self.largest_relative:.1g}"

    def table(self) -> str:
        """A few readable lines, and one for each of the first problems."""
        lines = [self.counts(), *(f"  PROBLEM: {problem}" for problem in shortened(self.problems))]
        return "\n".join(lines)

    def counts(self) -> str:
        """The lines without the problems."""
        lines = []
        if self.quantized and self.inside:
            for title, count in (("quantizers", self.quantizers), ("layers", self.layers)):
                explained = count.different - count.unexplained
                near = f" (within {count.farthest:.0e} steps)" if explained else ""
                lines.append(
                    f"  {title:<12}{count.compared:>12,} codes compared, {explained:,} differ at a rounding boundary"
                    f"{near}, {count.unexplained:,} without a reason"
                )
        if self.quantized:
            how = "without a flipped code" if self.inside else "equal but for float rounding"
            lines.append(f"  {'end to end':<12}{self.without_flip:>4} of {self.images} images {how}")
        largest = f"largest difference {self.largest_difference:.2g}"
        if self.quantized:
            largest = f"{largest} (images without a flip)" if self.without_flip else "a flipped code in every image"
        lines.append(f"  {'outputs':<12}{largest}, relative distance {self.largest_relative:.2g}")
        if self.trained_relative is not None:
            lines.append(
                f"  {'training':<12}{self.trained_equal:>4} of {self.images} images as before folding, relative "
                f"distance {self.trained_relative:.2g}"
            )
        return "\n".join(lines)


def shortened(problems: Sequence[str], owner: str = "") -> list[str]:
    """The first ``SHOWN_PROBLEMS`` problems, and how many more ``owner`` has: a wrong bias differs in every image."""
    more = len(problems) - SHOWN_PROBLEMS
    return [*problems[:SHOWN_PROBLEMS], *([f"{owner}and {more} more like these"] if more > 0 else [])]


# Names of inner tensors -> a function from images (B, 3, H, W) to these tensors by name, the images among them.
Runtime = Callable[[Sequence[str]], Callable[[Tensor], dict[str, np.ndarray]]]


def in_onnxruntime(model: ModelProto) -> Runtime:
    """A runtime for ``verify``: onnxruntime, in sessions that return inner tensors too."""

    def open_with(tensors: Sequence[str]) -> Callable[[Tensor], dict[str, np.ndarray]]:
        widened = ModelProto()
        widened.CopyFrom(model)
        present = {value.name for value in [*widened.graph.output, *widened.graph.input]}
        for name in dict.fromkeys(tensors):
            if name not in present:
                widened.graph.output.add().name = name
        session = open_session(widened.SerializeToString(), "the exported graph")
        names = [name for name in dict.fromkeys(tensors) if name != INPUT_NAME]

        def run(batch: Tensor) -> dict[str, np.ndarray]:
            feed = {INPUT_NAME: (batch.half() if _is_half(model) else batch).numpy()}
            return {**feed, **dict(zip(names, session.run(names, feed), strict=True))}

        return run

    return open_with


def _is_half(model: ModelProto) -> bool:
    return model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16


@contextmanager
def _watched(model: nn.Module, watch: Callable[[str, ActivationGrid, Tensor], Tensor | None]) -> Iterator[None]:
    """While open, ``watch(call, grid, input)`` sees every grid's input and may replace its output; for one forward pass
    of ``model``."""
    hooks, alive = [], []

    def hook(name: str):
        calls: dict[int, int] = {}

        def seen(grid: ActivationGrid, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor | None:
            alive.append(inputs[0])  # an identity is only unique while its tensor exists
            # Two convolutions that share a grid and a tensor quantize it twice: one call.
            number = calls.setdefault(id(inputs[0]), len(calls) + 1)
            return watch(call_name(name, number), grid, inputs[0])

        return seen

    for name, module in model.named_modules():
        if isinstance(module, ActivationGrid):
            hooks.append(module.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decoded(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _check_quantizers(result: Verification, model: nn.Module, exported: ExportedGraph, tensors: dict) -> None:
    grids = dict(model.named_modules())
    for place in exported.quantizers:
        source, codes = (torch.from_numpy(tensors[name]) for name in (place.source, place.codes))
        grid = grids[place.module]
        tolerance = max(QUANTIZER_TOLERANCE, 2 * FLOAT_SPACING * grid.grid.levels)
        result.quantizers.add(place.module, grid, source, codes, tolerance)


def _check_layers(
    result: Verification, model: nn.Module, exported: ExportedGraph, image: Tensor, tensors: dict
) -> None:
    def watch(name: str, grid: ActivationGrid, x: Tensor) -> Tensor:
        codes = torch.from_numpy(tensors[exported.codes.get(name) or exported.codes[name.split("@")[0]]])
        largest = max(1.0, float(x.abs().max() / grid.step))
        result.layers.add(name, grid, x, codes, LAYER_TOLERANCE * largest)
        return (codes.float() - grid.output_zero_point) * grid.output_step

    with _watched(model, watch):
        decoded = _decoded(model(image))
    theirs = torch.from_numpy(tensors[exported.decoded])
    if not outputs_agree(decoded, theirs):
        largest = (decoded - theirs).abs().max()
        said = f"image {result.images}: the head differs by {largest:.2g} from the network on the file's own codes"
        result.problems.append(said)


@torch.no_grad()
def references(
    model: nn.Module, images: Sequence[Tensor], batch_size: int = 1, trained: nn.Module | None = None
) -> list[Reference]:
    """Runs the network on images (3, H, W) with values 0..1.

    Args:
        model: the folded network (or a float one) in evaluation mode; its first output is (B, N, 5 + classes).
        batch_size: images the file takes at once; each image is repeated that often.
        trained: the network before folding, in evaluation mode.
    """
    codes: dict[str, Tensor] = {}

    def watch(name: str, grid: ActivationGrid, x: Tensor) -> None:
        codes[name] = grid.codes(x).to(torch.int16)

    found = []
    for image in progress(images, "network"):
        batch = image.unsqueeze(0).repeat(batch_size, 1, 1, 1)
        codes = {}
        with _watched(model, watch):
            decoded = _decoded(model(batch))
        found.append(Reference(batch, decoded, codes, None if trained is None else _decoded(trained(batch))))
    return found


def outputs_agree(ours: Tensor, theirs: Tensor, half: bool = False) -> bool:
    """Whether float rounding explains the differences between two results (B, N, 5 + classes); NaN never agrees.

    Args:
        half: ``theirs`` was computed in 16 bits.
    """
    difference = (ours - theirs).abs()
    if not half:
        return bool((difference <= OUTPUT_TOLERANCE * (1 + ours.abs())).all())
    parts = (slice(None, 4), slice(4, None))
    return all(_relative(difference[..., part], ours[..., part]) <= HALF_DISTANCE for part in parts)


def _compare_outputs(result: Verification, ours: Tensor, theirs: Tensor, flipped: bool) -> None:
    difference = (ours - theirs).abs()
    relative = _relative(difference, ours)
    result.largest_relative = max(result.largest_relative, relative)
    number = result.images
    if not flipped:
        result.largest_difference = max(result.largest_difference, float(difference.max()))
        result.without_flip += 1
        if not outputs_agree(ours, theirs, result.half):
            result.problems.append(f"image {number}: outputs differ by up to {float(difference.max()):.2g}")
    elif not relative <= GROSS_DIFFERENCE:
        result.problems.append(f"image {number}: flipped codes cannot explain a relative distance of {relative:.2g}")


def _compare_trained(result: Verification, before: Tensor, theirs: Tensor) -> None:
    difference = (before - theirs).abs()
    relative = _relative(difference, before)
    result.trained_relative = max(result.trained_relative or 0.0, relative)
    result.trained_equal += outputs_agree(before, theirs)
    if not relative <= GROSS_DIFFERENCE:
        result.problems.append(
            f"image {result.images}: relative distance {relative:.2g} from the network before folding"
        )


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.norm() / reference.norm().clamp_min(1e-12))


@torch.no_grad()
def verify(
    model: nn.Module, exported: ExportedGraph, expected: Iterable[Reference], runtime: Runtime | None = None
) -> Verification:
    """Compares an exported file with the network it was made of, on the CPU.

    Args:
        model: the folded network (or a float one) in evaluation mode.
        exported: from ``quant.onnx_graph.build``.
        expected: from ``references`` with the same model; a generator keeps no more than one image in memory.
        runtime: what runs the file, onnxruntime by default.

    Raises:
        UserError: onnxruntime is not installed or refuses the file.
    """
    result = Verification(quantized=bool(exported.quantizers), half=_is_half(exported.model))
    codes = [*exported.codes.values(), *(place.codes for place in exported.quantizers)]
    sources = [place.source for place in exported.quantizers]
    opened = runtime or in_onnxruntime(exported.model)
    outputs = (codes, [*codes, *sources]) if result.quantized else ()
    plain, *sessions = [opened([exported.decoded, *names]) for names in ((), *outputs)]
    for reference in progress(expected, "comparing"):
        result.images += 1
        theirs = torch.from_numpy(plain(reference.batch)[exported.decoded]).float()
        flipped = bool(sessions) and _check_inside(result, model, exported, reference, sessions)
        _compare_outputs(result, reference.decoded, theirs, flipped)
        if reference.trained is not None:
            _compare_trained(result, reference.trained, theirs)
    inside = [
        f"{title} {name}: {number} codes differ away from any rounding boundary"
        for title, count in (("quantizer", result.quantizers), ("layer", result.layers))
        for name, number in count.where.items()
    ]
    result.problems[:0] = inside  # first: they say where it begins
    return result


@torch.no_grad()
def verify_outputs(
    run: Callable[[Tensor], Tensor], expected: Iterable[Reference], quantized: bool, half: bool = False
) -> Verification:
    """Compares outputs only, of a runtime that shows no inner tensors.

    Args:
        run: images (B, 3, H, W) -> decoded rows (B, N, 5 + classes).
        quantized: a code may lie on the other side of a rounding boundary, and change many behind it: then outputs may
            differ, but not grossly.
        half: the file computes in 16 bits.
    """
    result = Verification(quantized=quantized, inside=False, half=half)
    for reference in progress(expected, "comparing"):
        result.images += 1
        theirs = run(reference.batch).float().cpu()
        flipped = quantized and not outputs_agree(reference.decoded, theirs)
        _compare_outputs(result, reference.decoded, theirs, flipped)
        if reference.trained is not None:
            _compare_trained(result, reference.trained, theirs)
    return result


def _check_inside(
    result: Verification, model: nn.Module, exported: ExportedGraph, reference: Reference, sessions: list
) -> bool:
    """Judges layers and quantizers by two widened sessions: codes only, and codes with the floats in front of them.

    Returns:
        Whether any code of the free runs differs.
    """
    tensors, with_sources = (session(reference.batch) for session in sessions)
    _check_quantizers(result, model, exported, with_sources)
    _check_layers(result, model, exported, reference.batch, tensors)
    codes = reference.codes
    return any(not np.array_equal(codes[name].numpy(), tensors[tensor]) for name, tensor in exported.codes.items())
