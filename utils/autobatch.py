"""``--batch-size -1``: the largest batch that fits into the memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from utils.errors import UserError
from utils.log import LOGGER

SIZES = (1, 2, 4, 8, 16)  # images whose memory is measured
SHARE = 0.8  # of the free memory; batches with many labels, validation and the moving average take the rest


def fitted_batch_size(sizes: Sequence[int], memory: Sequence[int], available: int, multiple: int = 1) -> int:
    """The batch that fills ``SHARE`` of the memory, by a straight line through what smaller ones took.

    Args:
        sizes: images per measured step.
        memory: bytes that each of them took.
        available: bytes.
        multiple: the batch is a multiple of it.

    Raises:
        UserError: not even the smallest batch fits.
    """
    slope, start = np.polyfit(sizes, memory, 1) if len(sizes) > 1 else (memory[0] / sizes[0], 0)
    batch = int((SHARE * available - start) / max(slope, 1)) // multiple * multiple
    if batch < multiple:
        raise UserError(
            f"--batch-size -1: {available / 2**30:.1f} GiB of GPU memory are free, too little for {multiple} "
            f"image{'s' if multiple > 1 else ''}: take a smaller --imgsz or model"
        )
    return batch


def auto_batch_size(step: Callable[[int], None], device: torch.device, multiple: int = 1) -> int:
    """Measures training steps on a CUDA device and returns the batch that fits.

    Args:
        step: runs forward and backward on so many images, and leaves nothing behind.
        multiple: the batch is a multiple of it.

    Raises:
        UserError: not even one image fits.
    """
    sizes, memory = [], []
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    for size in SIZES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step(size)
        except torch.cuda.OutOfMemoryError:
            break
        sizes.append(size)
        memory.append(torch.cuda.max_memory_allocated(device))
    torch.cuda.empty_cache()
    if not sizes:
        raise UserError(
            "--batch-size -1: one image does not fit into the GPU's memory: take a smaller --imgsz or model"
        )
    batch = fitted_batch_size(sizes, memory, free, multiple)
    took = ", ".join(f"{size}: {bytes_ / 2**30:.2f}" for size, bytes_ in zip(sizes, memory, strict=True))
    LOGGER.info(f"--batch-size -1: {batch} images for {free / 2**30:.1f} GiB that are free (GiB by images: {took})")
    return batch
