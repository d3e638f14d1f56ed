"""TorchScript files behind the face of ``models.backend``."""

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from models.backend import Backend, read_names, read_stride
from utils.errors import UserError

# Where YOLOv5 keeps what a TorchScript file says of itself, as JSON.
METADATA_FILE = "config.txt"


class TorchScriptBackend(Backend):
    """A traced network. It takes images of any number and size.

    Raises:
        UserError: not a TorchScript file.
    """

    def __init__(self, path: Path, device: torch.device, data: str | Path | None = None) -> None:
        extra = {METADATA_FILE: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer versions of torch announce another format
                module = torch.jit.load(str(path), _extra_files=extra, map_location=device).eval()
                # Weights that are stored as integers become constants here instead of being multiplied at each call.
                self.module = torch.jit.freeze(module)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{path}: not a TorchScript file: {str(error).strip().splitlines()[0]}") from error
        self.metadata = _as_text(extra[METADATA_FILE])
        self.half = self.metadata.get("half") == "True"
        names = read_names(path, self.metadata, data, self._columns(path, device))
        super().__init__(path, read_stride(path, self.metadata), names, device)

    @torch.inference_mode()
    def run(self, images: Tensor) -> tuple[Tensor, None]:
        images = images.to(self.device, torch.float16 if self.half else torch.float32)
        output = self.module(images)
        return (output[0] if isinstance(output, tuple | list) else output).float(), None

    def _columns(self, path: Path, device: torch.device) -> int | None:
        """Columns of the output, where the file says no names."""
        if "names" in self.metadata:
            return None
        self.device = device
        side = read_stride(path, self.metadata)
        return self.run(torch.zeros(1, 3, side, side))[0].shape[-1]


def _as_text(content: bytes | str) -> dict[str, str]:
    try:
        values = json.loads(content)
        return {str(key): value if isinstance(value, str) else str(value) for key, value in values.items()}
    except (ValueError, AttributeError):
        return {}
