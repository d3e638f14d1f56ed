"""Checkpoints: our own files of tensors and plain values; official YOLOv5 ``.pt`` files, read without unpickling."""

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor, nn

from utils.downloads import find_weights
from utils.errors import UserError
from utils.log import LOGGER
from utils.safe_pickle import PickledObject, PickledTensor, TorchFile

EXPORTED_SUFFIXES = (".onnx", ".engine", ".torchscript", ".xml", ".tflite", ".pb", ".mlmodel")
FORMAT = 1
MOST_TENSORS = 20_000  # YOLOv5x6 has about 1,000


@dataclass
class OfficialCheckpoint:
    """What an official YOLOv5 detection checkpoint holds: the EMA weights if there are any, else the model's, in fp32.

    ``anchors`` (levels, anchors, 2) are in units of each level's stride, ``stride`` (levels,) in pixels. ``epoch`` is
    -1 in a file whose training is over.
    """

    path: Path
    state_dict: dict[str, Tensor]
    yaml: dict
    names: dict[int, str]
    nc: int
    stride: Tensor
    anchors: Tensor
    epoch: int


@dataclass
class Weights:
    """A model to start from, whichever kind of file it came from.

    ``kind`` is 'official' or 'own'. ``quantization`` is the quantization config of an own checkpoint of a quantized
    model, else None. ``checkpoint`` is the whole dict of an own checkpoint, else None.
    """

    kind: str
    path: Path
    model_yaml: dict
    names: dict[int, str]
    state_dict: dict[str, Tensor]
    stride: Tensor
    quantization: dict | None = None
    checkpoint: dict | None = None

    def trained_with(self, option: str) -> object:
        """The option of train.py that an own checkpoint was trained with, or None."""
        return ((self.checkpoint or {}).get("options") or {}).get(option)


def load_official(path: str | Path) -> OfficialCheckpoint:
    """Reads an official YOLOv5 detection ``.pt`` (a pickled module) without running anything in it.

    Raises:
        UserError: the file is absent or damaged, names anything but tensors, containers and network classes, or holds
            another kind of model (segmentation, classification, anchor-free).
    """
    file = TorchFile(path)
    root = file.root
    epoch = -1
    if isinstance(root, dict):
        epoch = root.get("epoch") if isinstance(root.get("epoch"), int) else -1
        root = root["ema"] if isinstance(root.get("ema"), PickledObject) else root.get("model")
    if not isinstance(root, PickledObject):
        raise file.refusal("it holds no YOLOv5 model")
    detect = _detect_of(root, file)
    try:
        descriptions = _walk(root, "", {})
    except (RecursionError, TypeError, AttributeError):
        raise file.refusal("its modules are not nested as a network's are") from None
    # Files older than v6.0 carry the pixel anchors a second time; they follow from anchors and stride.
    descriptions = {name: item for name, item in descriptions.items() if not name.endswith(".anchor_grid")}
    extra = {"stride": root.state.get("stride", detect.state.get("stride", detect.state["_buffers"].get("stride")))}
    if not isinstance(extra["stride"], PickledTensor):
        raise file.refusal("its model has no strides")
    state_dict = {name: _as_float32(tensor) for name, tensor in file.tensors(descriptions).items()}
    anchors = [tensor for name, tensor in state_dict.items() if name.endswith(".anchors")]
    model_yaml = _plain_yaml(root.state.get("yaml"), file)
    names = _names(root.state.get("names"), file)
    nc = root.state.get("nc", detect.state.get("nc", len(names)))
    if not isinstance(nc, int) or nc != len(names):
        raise file.refusal(f"it has {len(names)} class names for {nc} classes")
    model_yaml["nc"] = nc
    stride = _as_float32(file.tensors(extra)["stride"]).flatten()
    return OfficialCheckpoint(Path(path), state_dict, model_yaml, names, nc, stride, anchors[0], epoch)


def _detect_of(model: PickledObject, file: TorchFile) -> PickledObject:
    """Returns the description of the Detect head, which is the last layer."""
    layers = _children(model).get("model")
    layer = list(_children(layers).values())[-1:] if isinstance(layers, PickledObject) else []
    if not layer or layer[0].name.rpartition(".")[2] != "Detect":
        found = layer[0].name if layer else "no layer"
        raise file.refusal(f"its last layer is {found}, not Detect: this is no YOLOv5 detection model")
    buffers = layer[0].state.get("_buffers")
    if not isinstance(buffers, dict) or not isinstance(buffers.get("anchors"), PickledTensor):
        raise file.refusal("its Detect layer has no anchors: this is an anchor-free model")
    return layer[0]


def _children(module: PickledObject) -> dict[str, PickledObject]:
    modules = module.state.get("_modules")
    if not isinstance(modules, dict):
        return {}
    return {name: child for name, child in modules.items() if isinstance(child, PickledObject)}


def _walk(module: PickledObject, prefix: str, found: dict[str, PickledTensor]) -> dict[str, PickledTensor]:
    """Collects the tensors of a described module under their state_dict names, in state_dict order."""
    passing = module.state.get("_non_persistent_buffers_set") or ()
    for group, left_out in (("_parameters", ()), ("_buffers", passing)):
        for name, tensor in (module.state.get(group) or {}).items():
            if isinstance(tensor, PickledTensor) and name not in left_out:
                found[prefix + name] = tensor
    if len(found) > MOST_TENSORS:
        raise RecursionError
    for name, child in _children(module).items():
        _walk(child, f"{prefix}{name}.", found)
    return found


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _plain_yaml(value: object, file: TorchFile) -> dict:
    """The model YAML as plain dicts, lists, numbers and text."""

    def plain(item: object) -> object:
        if isinstance(item, dict):
            return {plain(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [plain(entry) for entry in item]
        if item is None or isinstance(item, bool | int | float | str):
            return item
        raise TypeError

    try:
        if not isinstance(value, dict):
            raise TypeError
        return plain(value)
    except (TypeError, RecursionError):
        raise file.refusal("its model has no readable description (attribute 'yaml')") from None


def _names(value: object, file: TorchFile) -> dict[int, str]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or sorted(map(str, value)) != sorted(map(str, range(len(value)))):
        raise file.refusal("it has no list of class names")
    return {int(key): str(name) for key, name in sorted(value.items(), key=lambda entry: int(entry[0]))}


def check_is_checkpoint(path: Path) -> None:
    """Raises UserError unless ``path`` is a file, and none that an exporter wrote."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else f"does not exist{'' if path.is_absolute() else f' in {Path.cwd()}'}"
        raise UserError(f"{path} {what}. Give the path of a .pt file, or a released name such as yolov5n.pt")
    if path.suffix.lower() in EXPORTED_SUFFIXES:
        raise UserError(f"{path} is an exported network; give the .pt that it was exported from")


def load_checkpoint(path: str | Path) -> dict:
    """Reads one of our own checkpoints, with ``weights_only=True`` and onto the CPU.

    Raises:
        UserError: the file is absent, damaged, an official file, or of a newer format.
    """
    path = Path(path)
    check_is_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(f"{path} is not a checkpoint of this project: it holds more than tensors and values") from None
    except Exception as error:  # of whatever kind: torch lets through what a damaged archive or pickle causes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a PyTorch file ({reason})") from None
    return _of_known_format(checkpoint, path)


def _of_known_format(checkpoint: object, path: Path) -> dict:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("format"), int):
        raise UserError(f"{path} is not a checkpoint of this project: it has no 'format' entry")
    if checkpoint["format"] > FORMAT:
        raise UserError(f"{path} has format {checkpoint['format']}, this version reads up to {FORMAT}: update it")
    return checkpoint


def save_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Writes a checkpoint so that ``path`` is, at every moment, either the whole old file or the whole new one.

    The dict may hold tensors (any device) and plain values, nested; numpy scalars and paths become plain values.
    It is written to a temporary file in the same folder, synced, renamed, and the folder synced.

    Raises:
        UserError: it cannot be written (disk full, no permission). The old file is left as it was.
        TypeError: the dict holds something that ``torch.load(weights_only=True)`` would refuse.
    """
    path = Path(path)
    content = _storable({"format": FORMAT, **checkpoint}, "checkpoint")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError about its own file positions.
        kept = "The file that was there is unchanged" if path.exists() else "Nothing was left behind"
        raise UserError(f"{path} could not be written ({_write_failure(path, error)}). {kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_failure(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB free"
    except OSError:
        free = "free space unknown"
    return f"writing stopped half-way, most likely the disk or a quota is full: {free}"


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system lets folders be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storable(value: object, place: str) -> object:
    """Returns ``value`` with tensors on the CPU and everything else plain. Raises TypeError naming the place."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        # A view would drag its whole storage into the file.
        whole = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {_storable(key, place): _storable(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_storable(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{place} is a {type(value).__name__}: a checkpoint holds only tensors and plain values")


def read_weights(path: str | Path) -> Weights:
    """Reads an official YOLOv5 file or one of our own checkpoints, whichever it is.

    The state_dict is the EMA's where there is one. An official file that is missing is fetched, see ``find_weights``.
    Raises UserError as ``load_official`` and ``load_checkpoint``.
    """
    path = find_weights(path)
    check_is_checkpoint(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols of files that are not ours
            own = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of whatever kind: the other reader gives the reason
        own = None
    if not isinstance(own, dict) or "format" not in own:
        official = load_official(path)
        return Weights("official", path, official.yaml, official.names, official.state_dict, official.stride)
    checkpoint = _of_known_format(own, path)
    state_dict = checkpoint["ema"] if checkpoint.get("ema") is not None else checkpoint.get("model")
    missing = [key for key in ("model_yaml", "names", "stride") if key not in checkpoint]
    if state_dict is None or missing:
        raise UserError(f"{path} holds no model: {', '.join(missing) or 'neither model nor ema'} is missing")
    _check_entries(checkpoint, state_dict, path)
    return Weights(
        kind="own",
        path=path,
        model_yaml=checkpoint["model_yaml"],
        names=dict(checkpoint["names"]),
        state_dict=state_dict,
        stride=torch.as_tensor(checkpoint["stride"], dtype=torch.float32),
        quantization=checkpoint.get("quantization"),
        checkpoint=checkpoint,
    )


def _are_strides(value: object) -> bool:
    if isinstance(value, Tensor):
        value = value.tolist()
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(type(stride) in (int, float) and 1 <= stride < math.inf for stride in value)
    )


def _check_entries(checkpoint: dict, state_dict: object, path: Path) -> None:
    """Raises UserError unless the entries that describe a model are of the kinds that this project writes."""
    names, stride, options = checkpoint["names"], checkpoint["stride"], checkpoint.get("options") or {}
    fits = {
        "the weights": isinstance(state_dict, dict) and all(isinstance(value, Tensor) for value in state_dict.values()),
        "model_yaml": isinstance(checkpoint["model_yaml"], dict),
        "names": isinstance(names, dict)
        and set(names) == set(range(len(names)))
        and all(isinstance(name, str) for name in names.values()),
        "stride": _are_strides(stride),
        "quantization": isinstance(checkpoint.get("quantization"), dict | None),
        "options": isinstance(options, dict),
    }
    wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of this project: {', '.join(wrong)} cannot be read")


def transfer(
    model: nn.Module, state_dict: dict[str, Tensor], exclude: Sequence[str] = (), source: str | Path = "checkpoint"
) -> tuple[list[str], list[str]]:
    """Copies the tensors that fit ``model`` by name and shape, and logs how many and which do not.

    Args:
        model: the module to fill.
        state_dict: tensors by name.
        exclude: tensors whose name contains one of these texts are left alone, e.g. 'anchor'.
        source: where the tensors come from, for the log.

    Returns:
        Names of the model's tensors that were loaded, and of those that were not.
    """
    own = model.state_dict()
    fitting = {
        name: state_dict[name]
        for name, tensor in own.items()
        if name in state_dict and state_dict[name].shape == tensor.shape and not any(text in name for text in exclude)
    }
    model.load_state_dict(fitting, strict=False)
    skipped = [name for name in own if name not in fitting]
    left = f"; not transferred: {', '.join(skipped)}" if skipped else ""
    LOGGER.info(f"Transferred {len(fitting)}/{len(own)} items from {source}{left}")
    return list(fitting), skipped
