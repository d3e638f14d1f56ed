"""Where tensors live and in which precision: the ``--device`` and ``--precision`` flags."""

import os

import torch

from utils.errors import UserError

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def select_device(device: str = "") -> torch.device:
    """Returns the device a ``--device`` flag names.

    Args:
        device: '' (first GPU if there is one, else the CPU), 'cpu', 'mps', or GPU numbers such as '0' or '0,1'. Of a
            list, this process takes the one of its local rank (``LOCAL_RANK``, set by torchrun), else the first.

    Raises:
        UserError: the device does not exist here.
    """
    name = str(device).strip().lower().replace("cuda:", "")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine or this PyTorch has no Metal device. Use --device cpu")
        return torch.device("mps")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not name:
        return torch.device(f"cuda:{local_rank % count}" if count else "cpu")
    parts = [part.strip() for part in name.split(",") if part.strip()]
    if name == "cuda":
        parts = ["0"]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--device {device}: expected cpu, mps, or GPU numbers such as 0 or 0,1")
    absent = [part for part in parts if int(part) >= count]
    if absent:
        raise UserError(
            f"--device {device}: GPU {absent[0]} does not exist, PyTorch sees {count}. "
            f"Use --device cpu{f' or 0 to {count - 1}' if count else ''}"
        )
    return torch.device(f"cuda:{parts[local_rank % len(parts)]}")


def training_type(precision: str, device: torch.device) -> torch.dtype:
    """The type that convolutions are trained in.

    Args:
        precision: one of ``PRECISIONS``; ``auto`` is float16 on CUDA and float32 elsewhere.

    Raises:
        UserError: float16 anywhere but on CUDA (its gradients need a loss scale and hardware), or bfloat16 on a GPU
            without it.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    chosen = getattr(torch, precision)
    if chosen is torch.float16 and device.type != "cuda":
        raise UserError("--precision float16 is for CUDA; on a CPU take bfloat16 or float32")
    if chosen is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bfloat16: this GPU does not have it; take float16")
    return chosen


def limit_threads(threads: int | None = None) -> int:
    """Sets PyTorch's CPU threads and returns their number.

    Without a number: the cores this process may use, shared between the processes of one machine
    (``LOCAL_WORLD_SIZE``), unless ``OMP_NUM_THREADS`` already says.
    """
    if threads is None:
        if "OMP_NUM_THREADS" in os.environ:
            return torch.get_num_threads()
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(threads, 1))
    return torch.get_num_threads()
