"""What ends a run from outside, said in words: memory, disk, a killed process, Ctrl-C. Nothing is swallowed."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from training.run import Run
from utils import distributed
from utils.dataset import worker_failure
from utils.errors import NOT_WRITABLE, UserError

NO_MEMORY = re.compile(r"can't allocate memory|out of memory|bad_alloc|could not create a memory|ALLOC_FAILED", re.I)
LOST_PROCESS = re.compile(r"clos(ed|ing) by peer|connection (re)?set|connection closed|broken pipe|nccl|gloo", re.I)


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turns failures of the machine inside the block into a ``UserError`` that says what to change and what is kept.

    A ``KeyboardInterrupt`` stays one, its text says how to continue.
    """
    try:
        yield
    except UserError:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_continue(run)) from None
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        message = _explanation(error, run)
        if message is None:
            raise
        raise UserError(f"{message}. {how_to_continue(run)}") from error


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside the block SIGTERM, with which job schedulers end a program, is an interruption like Ctrl-C.

    Not in a job of several processes: there a handler would have to wait for a collective operation that never ends.
    """
    alone = not distributed.is_active() and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if alone else None
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)


def _explanation(error: Exception, run: Run) -> str | None:
    if isinstance(error, OSError):
        if error.errno not in NOT_WRITABLE:
            return None
        place = error.filename or run.save_dir
        return f"{place} could not be written ({error.strerror}): make room there, or choose another --project"
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY.search(text):
        return _out_of_memory(run, text)
    if message := worker_failure(error):
        return message
    if isinstance(error, ValueError) and text.startswith("Expected more than 1 value per channel"):
        return (
            "a batch of one image, at a size whose coarsest map has one cell, has no spread for a batch norm to divide "
            "by; take a larger --batch-size or --imgsz (--multi-scale halves it at times, --quad joins four images)"
        )
    if distributed.is_active() and LOST_PROCESS.search(text):
        first = text.splitlines()[0] if text else type(error).__name__
        return f"another process of this job has ended; its own messages say why ({first})"
    return None


def _out_of_memory(run: Run, reason: str) -> str:
    options = run.options
    batch, size = options.batch_size, options.imgsz
    share = batch // distributed.world_size()
    advice = [f"--batch-size {max(batch // 2, distributed.world_size())}"] if share > 1 else []
    if size > run.stride:
        advice.append(f"--imgsz {max(size // 2 // run.stride, 1) * run.stride}")
    if options.cache == "ram":
        advice.append("no --cache ram")
    if options.multi_scale:
        advice.append("no --multi-scale (its images are up to 1.5 times as wide)")
    first = reason.splitlines()[0].rstrip(". ") if reason else "the system gave none"
    return (
        f"memory ran out on {run.device} with {share} images of {size}x{size} pixels in a batch; try "
        f"{', or '.join(advice) or 'a smaller --cfg'} ({first})"
    )


def how_to_continue(run: Run) -> str:
    """How an interrupted run goes on, or that it cannot."""
    last = newest_checkpoint(run.weights_dir)
    if last is None:
        return "There is no checkpoint yet, so there is nothing to resume"
    start = "python" if distributed.world_size() == 1 else "torchrun ..."
    return f"The last checkpoint is whole; continue with: {start} train.py --resume {last}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The file in a run's ``weights`` folder that ``--resume`` takes: of the later phase that has one."""
    return next((folder / name for name in ("last.pt", "float_last.pt") if (folder / name).is_file()), None)
