"""The images that an exported file is compared with the network on."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.checkpoint import Weights
from utils.dataset_yaml import load_dataset_yaml, prepare_dataset
from utils.errors import UserError
from utils.images import letterbox, read_image
from utils.labels import list_images

VERIFICATION_IMAGES = 4


def verification_images(
    data: str | None, weights: Weights, size: tuple[int, int], count: int = VERIFICATION_IMAGES
) -> tuple[list[Tensor], str]:
    """Returns images (3, height, width) in 0..1 to compare on, and in words what they are.

    They come from ``data``, else from the data set the checkpoint was trained on if it is still there, else they are
    drawn.

    Raises:
        UserError: ``data`` was given and cannot be read.
    """
    used = data or weights.trained_with("data")
    try:
        if used:
            spec = load_dataset_yaml(used)
            prepare_dataset(spec, fetch=data is not None)
            paths = list_images(spec.val)
            chosen = paths[:: max(1, len(paths) // count)][:count]
            images = [letterbox(read_image(path), size, auto=False)[0] for path in chosen]
            arrays = [np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)) for image in images]
            return [torch.from_numpy(array).float() / 255 for array in arrays], f"images of {spec.yaml_file.name}"
    except UserError:
        if data:
            raise
    return drawn_images(size, count), "drawn images (give real ones with --data)"


def drawn_images(size: tuple[int, int], count: int, seed: int = 0) -> list[Tensor]:
    """Deterministic test images (3, height, width) in steps of 1/255: smooth colours, hard-edged boxes, some noise."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        coarse = torch.rand(1, 3, 7, 7, generator=generator)
        image = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0]
        for _ in range(12):
            top, left, height, width = (
                torch.rand(4, generator=generator).mul(torch.tensor([*size, *size])).long().tolist()
            )
            colour = torch.rand(3, 1, 1, generator=generator)
            image[:, top : top + height // 3 + 4, left : left + width // 3 + 4] = colour
        image += 0.03 * torch.randn(image.shape, generator=generator)
        images.append(image.clamp(0, 1).mul(255).round() / 255)
    return images
