"""OpenVINO models behind the face of ``models.backend``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from models.backend import ExportedBackend, read_names, read_stride
from utils.errors import UserError
from utils.metadata import read_metadata_file
from utils.signal_stack import kept_signal_stack
from utils.suppression import Suppression


class OpenVinoBackend(ExportedBackend):
    """An OpenVINO model on the CPU, with as many threads as PyTorch uses.

    Without ``half`` it computes in float32, so that it can be compared with the network; where a processor has
    bfloat16 OpenVINO would otherwise take that, which is faster. Integer layers are the same in both.

    Args:
        path: the ``.xml``, or the folder with one in it.
        data: a data set YAML, asked for class names if the model does not say them.

    Raises:
        UserError: OpenVINO is not installed or refuses the model, no ``.xml``, or another kind of network.
    """

    def __init__(self, path: Path, device: torch.device, data: str | Path | None = None, half: bool = False) -> None:
        path = find_xml(path)
        openvino = import_openvino(str(path))
        try:
            model = openvino.Core().read_model(str(path))
            self.compiled = compile_model(openvino, model, half)
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise UserError(f"{path}: OpenVINO cannot load it: {str(error).strip().splitlines()[-1]}") from error
        if len(model.inputs) != 1 or len(model.inputs[0].partial_shape) != 4:
            raise UserError(f"{path}: expected one input (batch, 3, height, width)")
        batch, _, height, width = (
            side.get_length() if side.is_static else None for side in model.inputs[0].partial_shape
        )
        self.fixed_batch = batch
        self.fixed_size = (height, width) if height and width else None
        self.half = model.inputs[0].element_type == openvino.Type.f16
        self.metadata = read_metadata_file(path.with_suffix(".yaml"))
        self.suppression = Suppression.from_metadata(self.metadata)
        last = model.outputs[0].partial_shape[-1]
        says = last.is_static and not self.suppression  # after suppression there are always six
        names = read_names(path, self.metadata, data, last.get_length() if says else None)
        super().__init__(path, read_stride(path, self.metadata), names, device)

    def infer(self, images: Tensor) -> list[Tensor]:
        results = self.compiled([images.numpy()])
        # Copies: the arrays belong to the runtime, which writes into them again.
        return [torch.from_numpy(results[index].copy()) for index in range(len(self.compiled.outputs))]


def compile_model(openvino: ModuleType, model, half: bool = False):
    """Compiles an ``openvino.Model`` for the CPU, with as many threads as PyTorch uses; ``half`` as of the class."""
    settings: dict[str, object] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if not half:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    with kept_signal_stack():
        return openvino.Core().compile_model(model, "CPU", settings)


def in_openvino(path: Path) -> Callable[[Sequence[str]], Callable[[Tensor], dict]]:
    """A runtime for ``quant.verify.verify``: the model at ``path``, with inner tensors as further outputs.

    OpenVINO keeps the tensor names of the ONNX file that a model was made of.

    Raises:
        UserError: OpenVINO is not installed; when called with names, that the model has no such tensors.
    """
    openvino = import_openvino(str(path))

    def open_with(tensors: Sequence[str]) -> Callable[[Tensor], dict]:
        model = openvino.Core().read_model(str(path))
        present = {name for port in [*model.outputs, *model.inputs] for name in port.get_names()}
        missing = [name for name in dict.fromkeys(tensors) if name not in present]
        try:
            for name in missing:
                model.add_outputs(name)
        except RuntimeError as error:
            raise UserError(f"{path}: it has no tensor of the name {name}") from error
        compiled = compile_model(openvino, model)
        image = model.inputs[0].get_any_name()
        half = model.inputs[0].element_type == openvino.Type.f16
        names = [name for name in dict.fromkeys(tensors) if name != image]

        def run(batch: Tensor) -> dict:
            given = (batch.half() if half else batch).numpy()
            results = compiled([given])
            return {image: given, **{name: results[name].copy() for name in names}}

        return run

    return open_with


def find_xml(path: Path) -> Path:
    """The ``.xml`` of an OpenVINO model: ``path`` itself or the one in that folder.

    Raises:
        UserError: there is none, or more than one.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.xml"))
    if len(files) != 1:
        raise UserError(f"{path}: expected one .xml of OpenVINO in this folder, found {len(files)}")
    return files[0]


def import_openvino(name: str) -> ModuleType:
    """Returns the package; ``name`` is what the message calls the file that needs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(f"{name}: OpenVINO models need the package openvino: pip install openvino") from error
    return openvino
