"""Images of a data set for the commands that look at a network outside a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.dataset import DetectionDataset, collate
from utils.dataset_yaml import load_dataset_yaml, prepare_dataset
from utils.progress import progress

# Pixels of one batch: 16 images of 320 x 320. A network's layer outputs of so many take 300 MB with yolov5n's width.
BATCH_PIXELS = 16 * 320 * 320


def labelled_batches(
    dataset: DetectionDataset, images: int, device: torch.device | str = "cpu", batch_size: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Evenly spaced images of a data set that letterboxes to squares, with their labels.

    Args:
        dataset: neither augmented nor rectangular.
        images: how many; all of a smaller set.
        batch_size: default: as many as ``BATCH_PIXELS`` allow.

    Returns:
        Batches of images (B, 3, S, S), 0 to 1, and targets (n, 6) rows image, class, normalised centre, width, height.
    """
    count = min(images, len(dataset))
    chosen = [round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)]
    size = batch_size or max(BATCH_PIXELS // dataset[chosen[0]][0][0].numel(), 1)  # [0][0]: one plane of the image
    batches = []
    for first in progress(range(0, count, size), "reading images"):
        stacked, targets, _, _ = collate([dataset[index] for index in chosen[first : first + size]])
        batches.append((stacked.to(device).float() / 255, targets.to(device)))
    return batches


def thin_out(batches: Sequence[Tensor], images: int) -> list[Tensor]:
    """At most ``images`` images, evenly spaced, in batches of at most ``BATCH_PIXELS``."""
    every = max(sum(len(batch) for batch in batches) // images, 1)
    chosen = torch.cat([batch[::every] for batch in batches])[:images]
    return list(chosen.split(max(BATCH_PIXELS // chosen[0, 0].numel(), 1)))


def open_samples(
    data: str | Path, image_size: int, images: int, names: dict[int, str], stride: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """``labelled_batches`` of the training split of a data set YAML.

    Args:
        names: of the network's classes; a network of one class sees every label as that one.
        stride: the network's largest, in pixels.

    Raises:
        UserError: the YAML or its images are absent or wrong, or it has other classes than the network.
    """
    spec = load_dataset_yaml(data)
    prepare_dataset(spec)
    single = len(names) == 1
    dataset = DetectionDataset(
        spec.train, image_size, single_class=single, stride=stride, num_classes=None if single else len(names)
    )
    return labelled_batches(dataset, images, device)
