"""OpenVINO models: a folder with ``.xml``, ``.bin`` and what the model says of itself, made of an ONNX graph."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from exporting.onnx_files import compare_suppression
from exporting.whole_files import refuse_difference
from models.openvino_backend import import_openvino, in_openvino
from quant.onnx_graph import ExportedGraph
from quant.openvino_graph import merge_clips
from quant.verify import Reference, Verification, verify
from utils.errors import UserError
from utils.metadata import write_metadata_file
from utils.onnx_suppression import COUNT, DECODED, DETECTIONS
from utils.suppression import Suppression


def write_openvino(
    exported: ExportedGraph, folder: Path, stem: str, folded: nn.Module, expected: Sequence[Reference], half: bool
) -> Verification:
    """Converts the graph and writes ``<stem>.xml``, ``.bin`` and ``.yaml`` into ``folder``, which is replaced.

    Args:
        exported: with metadata, which becomes the ``.yaml``.
        folded: the network it was built of.
        half: weights are stored as float16 (float models).

    Raises:
        UserError: OpenVINO is not installed, the folder cannot be written, or the model computes something else.
    """
    openvino = import_openvino(str(folder))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        source = temporary / f"{stem}.onnx"
        onnx.save_model(exported.model, str(source))
        model = read_onnx(openvino, source)
        openvino.save_model(model, str(temporary / f"{stem}.xml"), compress_to_fp16=half)
        del model
        source.unlink()
        metadata = {entry.key: entry.value for entry in exported.model.metadata_props}
        write_metadata_file(metadata, temporary / f"{stem}.yaml")
        result = _compare(temporary / f"{stem}.xml", exported, folded, expected)
        refuse_difference(result, folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def read_onnx(openvino, source: Path):
    """The ``openvino.Model`` of an ONNX file, its quantizers as OpenVINO likes them."""
    # Not openvino.convert_model: that one reports to its makers if the package for it is installed.
    model = openvino.Core().read_model(str(source))
    merge_clips(model)
    return model


def _compare(xml: Path, exported: ExportedGraph, folded: nn.Module, expected: Sequence[Reference]) -> Verification:
    runtime = in_openvino(xml)
    result = verify(folded, exported, expected, runtime)
    settings = Suppression.from_metadata({entry.key: entry.value for entry in exported.model.metadata_props})
    if settings is not None:
        names = (DETECTIONS, COUNT, DECODED)
        run = runtime(names)

        def outputs(batch: Tensor) -> list[Tensor]:
            found = run(batch)
            return [torch.from_numpy(found[name]) for name in names]

        compare_suppression(result, settings, outputs, expected)
    return result
