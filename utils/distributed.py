"""Several processes that train one network: torchrun starts them, ``torch.distributed`` connects them.

    torchrun --nproc_per_node 4 train.py ...

A program that runs alone needs no special case: it is then the main process of a group of one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.devices import select_device
from utils.errors import UserError

Result = TypeVar("Result")
REPORT_AFTER = 3.0  # seconds; torchrun looks after its processes ten times a second
# While the main process downloads or writes, the others wait; one that dies is noticed by its closed connection.
LONGEST_WAIT = timedelta(hours=24)

_control: dist.ProcessGroup | None = None  # over gloo, for waiting and for plain values, whatever tensors go through


def is_active() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """Number of processes, on all machines."""
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    """Whether this is the one process that writes files and reports."""
    return rank() == 0


def start(device: str) -> None:
    """Connects the processes that torchrun started; does nothing in a program that was started alone.

    Args:
        device: the ``--device`` flag. Processes on GPUs talk through nccl, all others through gloo.

    Raises:
        UserError: several GPUs are named without torchrun, or there are more processes than GPUs.
    """
    global _control
    named = [part.strip() for part in str(device).split(",") if part.strip()]
    if "LOCAL_RANK" not in os.environ:
        if len(named) > 1:
            raise UserError(
                f"--device {device}: one process uses one device. For several GPUs start one process for each: "
                f"torchrun --nproc_per_node {len(named)} train.py --device {device} ..."
            )
        return
    if is_active() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    _check_devices(device, named)
    chosen = select_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    _control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


def _check_devices(device: str, named: list[str]) -> None:
    """Raises UserError if processes of this machine would share a GPU."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if named and not named[0].removeprefix("cuda:").isdecimal():
        return  # cpu, mps, or what select_device refuses
    gpus = len(named) or torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(
            f"torchrun started {processes} processes for {gpus} GPUs (--device {device or 'not given'}): each needs "
            f"its own. Use --nproc_per_node {gpus}"
        )


def stop() -> None:
    """Ends the connection; call it when the work is done."""
    global _control
    if is_active():
        dist.destroy_process_group()
    _control = None


def let_main_report() -> None:
    """Waits a moment in all processes but the main one, before an error is reported.

    What all of them refuse is then said once, as torchrun ends the others when the main process is gone.
    """
    if not is_main():
        time.sleep(REPORT_AFTER)


# --- one process for all ----------------------------------------------------------------------------------------------


def from_main(action: Callable[[], Result]) -> Result:
    """What ``action()`` returns in the main process, in every process; plain values and tensors.

    Raises:
        UserError: ``action`` raised it; then in every process, so that none waits for the others.
    """
    if not is_active():
        return action()
    message: list[Any] = [None, None]
    if is_main():
        try:
            message[0] = action()
        except UserError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message, src=0, group=_control)
    if message[1] is not None:
        raise UserError(message[1])
    return message[0]


@contextmanager
def local_main_first() -> Iterator[None]:
    """Lets the first process of each machine through the block before its others, which then find its caches."""
    if not is_active():
        yield
        return
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        _wait_for_all()
    try:
        yield
    except UserError:
        # This process ends, and by that the others' waiting.
        raise
    if first:
        _wait_for_all()


def _wait_for_all() -> None:
    dist.barrier(group=_control)


def gather(value: Result) -> list[Result] | None:
    """``value`` of every process by rank in the main one; None in the others."""
    if not is_active():
        return [value]
    found: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, found, dst=0, group=_control)
    return found


# --- tensors ----------------------------------------------------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, without gradient; every process must call it."""
    x = x.detach()
    if is_active():
        x = x.clone()
        dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes, in floating point, without gradient; every process must call it."""
    return total(x if x.is_floating_point() else x.float()) / world_size() if is_active() else x.detach()


def copy_from_main(module: nn.Module) -> None:
    """Gives parameters and buffers of ``module`` the main process's values."""
    if not is_active():
        return
    tensors: dict[torch.dtype, list[Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        tensors.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in tensors.values():  # one message for each type instead of one for each tensor
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, values in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def check_equal(tensors: Mapping[str, Tensor], moment: str) -> None:
    """Raises UserError unless all processes have bit-identical ``tensors`` (names must agree, too).

    Each tensor is reduced to the sum of its bits read as integers, weighted by position so that a swap is seen.

    Args:
        tensors: float32 or integer tensors by name.
        moment: when this was, for the message.
    """
    if not is_active() or not tensors:
        return
    sums = torch.stack([_checksum(tensor) for tensor in tensors.values()])
    low, high = sums.clone(), sums
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    differing = [name for name, differs in zip(tensors, (low != high).tolist(), strict=True) if differs]
    if differing:
        raise UserError(
            f"{moment} the processes no longer agree on {len(differing)} of {len(tensors)} tensors, first "
            f"{differing[0]}: a device or the network between the machines computes or transfers wrongly. Continue "
            "from the last checkpoint with --resume"
        )


def _checksum(tensor: Tensor) -> Tensor:
    """A scalar int64 that changes with any bit of ``tensor``; sums wrap around, which does no harm."""
    bits = tensor.detach().contiguous().reshape(-1)
    if bits.dtype is torch.bool:
        bits = bits.byte()
    elif bits.is_floating_point():
        bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    weights = torch.arange(1, bits.numel() + 1, device=bits.device)
    return (bits.long() * weights).sum()
