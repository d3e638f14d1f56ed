"""TorchScript files."""

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from exporting.subject import Subject
from exporting.whole_files import kept_when_whole, refuse_difference
from models.torchscript_backend import METADATA_FILE, TorchScriptBackend
from quant.verify import Reference, Verification, verify_outputs


def write_torchscript(
    subject: Subject, target: Path, expected: Sequence[Reference], batch_size: int = 1, half: bool = False
) -> Verification:
    """Traces the folded network and writes it, with YOLOv5's ``config.txt`` inside; it takes images of any size.

    Integer weights stay integers in the file.

    Raises:
        UserError: it cannot be written, or it does not compute what the network computes.
    """
    model = copy.deepcopy(subject.folded).half() if half else subject.folded
    like = next(iter(model.parameters()), next(model.buffers()))
    example = torch.zeros(batch_size, 3, *subject.size, device=like.device, dtype=torch.half if half else torch.float)
    metadata = {"shape": list(example.shape), **subject.metadata, "half": str(half)}
    metadata |= {"stride": int(metadata["stride"]), "names": subject.trained.names}
    with kept_when_whole(target) as temporary:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about Python numbers, which are the same for every image
            traced = torch.jit.trace(model, example, strict=False, check_trace=False)
            traced.save(str(temporary), _extra_files={METADATA_FILE: json.dumps(metadata)})
        backend = TorchScriptBackend(temporary, torch.device("cpu"))
        result = verify_outputs(lambda batch: backend(batch)[0], expected, subject.quantized, half)
        refuse_difference(result, target)
    return result
