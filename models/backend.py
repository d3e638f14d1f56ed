"""One face for weights files of every kind: PyTorch checkpoints (YOLOv5's and ours) and ONNX files.

    backend = load_backend("best.onnx", torch.device("cpu"))
    decoded, raw = backend(images)

``decoded`` is (B, N, 5 + classes): box centre, width and height in input pixels, objectness, class probabilities.
"""

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.yolo import DetectionModel, model_from_weights
from utils.checkpoint import Weights, read_weights
from utils.errors import UserError
from utils.log import LOGGER

DEFAULT_STRIDE = 32


class Backend:
    """A loaded detector that is called with images.

    Attributes:
        stride: the sides of an image must be multiples of it (pixels).
        names: class index -> name; ``nc`` is their number.
        fixed_batch: images per call if the file takes no other number, else None. Calls with another number work: they
            are cut into pieces, and the last one is filled up.
        fixed_size: (height, width) if the file takes no other, else None.
        is_pt: whether this is a PyTorch model, which also returns raw maps.
    """

    is_pt = False
    fixed_batch: int | None = None
    fixed_size: tuple[int, int] | None = None

    def __init__(self, path: Path, stride: int, names: Mapping[int, str], device: torch.device) -> None:
        self.path, self.stride, self.names, self.device = path, int(stride), dict(names), device

    @property
    def nc(self) -> int:
        return len(self.names)

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """Images (B, 3, H, W), RGB, 0..1 -> (decoded (B, N, 5 + classes) on ``device``, raw maps or None).

        Raises:
            UserError: the file does not take images of this size.
        """
        size = tuple(images.shape[-2:])
        if self.fixed_size and size != self.fixed_size:
            height, width = self.fixed_size
            given = f"--imgsz {height}" if height == width else f"--imgsz {height} {width}"
            raise UserError(
                f"{self.path} takes images of {height}x{width} pixels and got {size[0]}x{size[1]}: pass {given}, or "
                "export with --dynamic"
            )
        if size[0] % self.stride or size[1] % self.stride:
            raise UserError(f"{self.path}: image sides must be multiples of {self.stride}, got {size[0]}x{size[1]}")
        return self.run(images)

    def run(self, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        raise NotImplementedError

    def warm_up(self, size: tuple[int, int], batch_size: int = 1) -> None:
        """Runs a blank batch, so that a first measured one has no start-up costs in it."""
        self(torch.zeros(batch_size, 3, *(self.fixed_size or size), device=self.device))


class TorchBackend(Backend):
    """A checkpoint: float networks with BatchNorm folded, quantized ones as they were trained."""

    is_pt = True

    def __init__(self, path: Path, device: torch.device, half: bool = False) -> None:
        model, _ = load_network(path)
        if half and getattr(model, "quantization", None):
            LOGGER.warning(f"{path}: quantized models compute in float32; --half ignored")
            half = False
        model = model.fuse().eval().to(device)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model: nn.Module = model.half() if half else model
        self.half = half
        super().__init__(path, int(max(model.stride)), model.names, device)

    @torch.inference_mode()
    def run(self, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        images = images.to(self.device)
        return self.model(images.half() if self.half else images.float())


class OnnxBackend(Backend):
    """An ONNX file in onnxruntime, with as many threads as PyTorch uses."""

    def __init__(self, path: Path, device: torch.device, data: str | Path | None = None) -> None:
        self.session = _open_onnx(path, device)
        given, output = self.session.get_inputs()[0], self.session.get_outputs()[0]
        self.input_name, self.output_name = given.name, output.name
        self.half = given.type == "tensor(float16)"
        batch, _, height, width = given.shape
        self.fixed_batch = batch if isinstance(batch, int) else None
        self.fixed_size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.metadata = dict(metadata)
        columns = output.shape[-1] if isinstance(output.shape[-1], int) else None
        names = _names(path, metadata, data, columns)
        super().__init__(path, _stride(path, metadata), names, device)

    def run(self, images: Tensor) -> tuple[Tensor, None]:
        images = images.detach().to("cpu", torch.float16 if self.half else torch.float32)
        pieces = images.split(self.fixed_batch or max(len(images), 1))
        decoded = torch.cat([self._run_piece(piece) for piece in pieces])
        return decoded.float().to(self.device), None

    def _run_piece(self, images: Tensor) -> Tensor:
        missing = (self.fixed_batch or len(images)) - len(images)
        padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        feed = {self.input_name: padded.contiguous().numpy()}
        return torch.from_numpy(self.session.run([self.output_name], feed)[0])[: len(images)]


def load_network(path: str | Path) -> tuple[DetectionModel, Weights]:
    """Rebuilds the network of a checkpoint, float or quantized, on the CPU, in training mode, BatchNorm not folded.

    Raises:
        UserError: no such file, or not a checkpoint of a YOLOv5 detector.
    """
    weights = read_weights(path)
    if weights.quantization is None:
        return model_from_weights(weights), weights
    # Only now: float models must work without the quantization code, and ``quant`` imports ``models``.
    from quant.prepare import model_from_checkpoint

    return model_from_checkpoint(weights.checkpoint), weights


def load_backend(
    path: str | Path, device: torch.device | str = "cpu", data: str | Path | None = None, half: bool = False
) -> Backend:
    """Loads a weights file.

    Args:
        path: ``.pt`` (YOLOv5's or this project's) or ``.onnx``.
        device: where a PyTorch model computes, and where the results lie.
        data: a data set YAML, asked for class names if an ONNX file does not say them.
        half: compute in float16 (PyTorch float models).

    Raises:
        UserError: no such file, a kind of file that is not supported, or a broken one.
    """
    path, device = Path(path), torch.device(device)
    if not path.exists():
        raise UserError(f"{path}: no such file. Give a checkpoint (.pt) or an exported model (.onnx) with --weights")
    loaders: dict[str, Callable[[], Backend]] = {
        ".pt": lambda: TorchBackend(path, device, half),
        ".onnx": lambda: OnnxBackend(path, device, data),
    }
    if path.suffix.lower() not in loaders:
        raise UserError(f"{path}: '{path.suffix}' files are not supported, only {' and '.join(loaders)}")
    return loaders[path.suffix.lower()]()


def open_session(content: bytes | str, name: str, providers: tuple[str, ...] = ()):
    """Opens an ONNX model (its bytes or its path) in onnxruntime; ``name`` is what messages call it.

    Raises:
        UserError: onnxruntime is not installed, or refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{name}: running ONNX needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Between two calls its threads would otherwise wait busily and take the cores from what PyTorch does meanwhile.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = [provider for provider in providers if provider in onnxruntime.get_available_providers()]
    if len(wanted) < len(providers):
        LOGGER.warning(f"{name}: this onnxruntime has no {' or '.join(providers)}; it computes on the CPU")
    try:
        return onnxruntime.InferenceSession(content, options, providers=[*wanted, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: onnxruntime cannot load it: {reason}") from error


def _open_onnx(path: Path, device: torch.device):
    session = open_session(str(path), str(path), ("CUDAExecutionProvider",) if device.type == "cuda" else ())
    given = session.get_inputs()
    if len(given) != 1 or len(given[0].shape) != 4 or len(session.get_outputs()[0].shape) != 3:
        raise UserError(
            f"{path}: expected one input (batch, 3, height, width) and an output (batch, boxes, 5 + classes)"
        )
    return session


def _stride(path: Path, metadata: Mapping[str, str]) -> int:
    try:
        return int(metadata["stride"])
    except (KeyError, ValueError):
        LOGGER.warning(f"{path}: no stride in its metadata, assuming {DEFAULT_STRIDE}")
        return DEFAULT_STRIDE


def _names(path: Path, metadata: Mapping[str, str], data: str | Path | None, columns: int | None) -> dict[int, str]:
    """Class names: the file's own, else the data set's, else class0, class1 ... for as many as the output has."""
    text = metadata.get("names", "")
    for parse in (ast.literal_eval, json.loads):
        try:
            names = parse(text)
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            return {int(index): str(name) for index, name in pairs}
        except (ValueError, SyntaxError, TypeError):
            continue
    if data is not None:
        from utils.dataset_yaml import load_dataset_yaml

        return load_dataset_yaml(data).names
    if columns is None:
        raise UserError(f"{path}: holds no class names: give a data set YAML with --data")
    LOGGER.warning(f"{path}: no class names in its metadata, calling them class0 to class{columns - 6}")
    return {index: f"class{index}" for index in range(columns - 5)}
