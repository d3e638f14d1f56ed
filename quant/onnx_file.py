"""Writes any folded network into an ONNX file, and compares what onnxruntime makes of it before it says so.

``export.py`` does the same for detectors, with more formats and metadata.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from quant.fold import IntegerConv2d
from quant.onnx_graph import DEFAULT_OPSET, build, trace, traceable
from quant.verify import Verification, references, verify
from utils.errors import UserError


def export_onnx(
    folded: nn.Module, file: str | Path, example: Tensor, opset: int = DEFAULT_OPSET, int4_weights: bool = False
) -> Verification:
    """Writes ``folded`` for inputs of the shape of ``example``; input ``images``, output ``output0``.

    Args:
        folded: from ``quant.fold.fold``; it takes one tensor and returns one, of at least two dimensions.
        file: written only if onnxruntime computes the network's codes in it.
        example: a real input (B, C, H, W): its first image is what the comparison is made with.
        opset: version of the standard operators; 21 or more with ``int4_weights``.
        int4_weights: codes that fit in 4 bits are stored two a byte; convolutions then run in float.

    Returns:
        What the comparison found; ``print(result.table())``.

    Raises:
        UserError: not folded, another kind of output, or a file that computes something else (nothing is written).
    """
    if not any(isinstance(module, IntegerConv2d) for module in folded.modules()):
        raise UserError("this model is not folded: export what fold(model) returns")
    folded, example = folded.eval().cpu(), example.cpu()
    with torch.no_grad():
        output = folded(example)
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise UserError("the network must return one tensor (B, ...): wrap it in a module that picks its output")
    exported = build(trace(traceable(folded), example, opset), opset, int4_weights)
    result = verify(folded, exported, references(folded, [example[0]], len(example)))
    if not result.holds:
        raise UserError(f"{file} is not written: it would not compute what the network does\n{result.table()}")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(exported.model, str(file))
    return result
