"""Measures quantization, GABFusion and ADA on another task: a small U-Net that segments drawn shapes.

    python benchmarks/segmentation.py                        (about 20 minutes on one core; --seeds 1 for a look)

The paper leaves segmentation open, and the rule for choosing ADA's divergence. A U-Net's skips are concatenations of a
deep and a shallow branch, as the detector's neck has them. Every row starts from the same float network of its seed,
sees the same batches, and is measured after its last step; the float row trains on for as many steps. Images are made
here, masks are exact. What is reported is the mean IoU of the three foreground classes on 256 images never trained on.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, write_section  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from models.common import Concat, Conv  # noqa: E402
from quant import (  # noqa: E402
    build_config,
    build_optimizer,
    calibrate,
    penalty,
    prepare,
    set_strength,
    strength_at,
    update_balance,
)
from quant.ada import AttentionAlignment  # noqa: E402
from quant.norms import reestimate_norms  # noqa: E402
from utils.log import LOGGER  # noqa: E402

CLASSES = ("ground", "disc", "square", "triangle")
SIZE = 48  # pixels
TRAIN_IMAGES, TEST_IMAGES, BATCH = 512, 256, 32
FLOAT_EPOCHS, EPOCHS = 24, 4
ADA_GRADIENT_RATIO = 0.2  # of the task's gradient at the features, measured at the first batch
VARIANTS = ("base", "gabfusion", "feedback", "backward", "ada kl", "ada js", "gabfusion + ada kl")
METHODS = ("lsq", "pact", "dsq", "n2uq")


class UNet(nn.Module):
    """Three levels of SiLU convolutions, two skips; returns class scores and the decoder's two features.

    (B, 3, H, W), 0 to 1 -> (B, classes, H, W), [(B, 16, H/2, W/2), (B, 8, H, W)].
    """

    def __init__(self, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Sequential(Conv(i, o, 3), Conv(o, o, 3)) for i, o in ((3, 8), (8, 16), (16, 32))])
        self.pool, self.resize = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.skips = nn.ModuleList([Concat(), Concat()])
        self.up = nn.ModuleList([nn.Sequential(Conv(i, o, 3), Conv(o, o, 3)) for i, o in ((48, 16), (24, 8))])
        self.head = nn.Conv2d(8, classes, 1)

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The scores and the outputs of both decoder levels."""
        fine = self.down[0](x)
        middle = self.down[1](self.pool(fine))
        coarse = self.down[2](self.pool(middle))
        first = self.up[0](self.skips[0]([self.resize(coarse), middle]))
        second = self.up[1](self.skips[1]([self.resize(first), fine]))
        return self.head(second), [first, second]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[0]


def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image (H, W, 3) and its mask (H, W), uint8: shapes of any colour on noisy ground, later ones on top."""
    base = generator.integers(100, 156, 3)
    image = np.full((SIZE, SIZE, 3), base, np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(generator.integers(2, 7)):
        kind, radius = int(generator.integers(1, 4)), float(generator.uniform(6, 13))
        centre = generator.uniform(0, SIZE, 2)
        corners = {1: 40, 2: 4, 3: 3}[kind]
        angles = generator.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        outline = np.round(centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.int32)
        colour = [int(value) for value in (base + generator.choice([-1, 1], 3) * generator.integers(40, 100, 3))]
        cv2.fillPoly(image, [outline], colour)
        cv2.fillPoly(mask, [outline], kind)
    noisy = image + generator.normal(0, 10, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), mask


def dataset(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) as floats 0 to 1 and masks (N, S, S) of class indices."""
    generator = np.random.default_rng(seed)
    pictures, masks = zip(*(draw(generator) for _ in range(images)), strict=True)
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return stacked.contiguous(), torch.from_numpy(np.stack(masks)).long()


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean over the foreground classes of intersection over union, all pixels of all images counted together."""
    model.eval()
    found = torch.cat([model(batch).argmax(1) for batch in images.split(64)])
    count = torch.bincount((masks * len(CLASSES) + found).flatten(), minlength=len(CLASSES) ** 2)
    confusion = count.view(len(CLASSES), len(CLASSES)).double()
    intersection = confusion.diagonal()
    return float((intersection / (confusion.sum(0) + confusion.sum(1) - intersection))[1:].mean())


@dataclass
class Task:
    """The images of a study, and one run's seed."""

    images: Tensor
    masks: Tensor
    test_images: Tensor
    test_masks: Tensor
    seed: int

    def batches(self, epochs: int):
        """(progress 0..1, images, masks) of each step: shuffled, mirrored at random; the same ones for a seed."""
        generator = torch.Generator().manual_seed(self.seed)
        steps = len(self.images) // BATCH
        for step in range(epochs * steps):
            if step % steps == 0:
                order = torch.randperm(len(self.images), generator=generator)
            chosen = order[step % steps * BATCH :][:BATCH]
            flips = [axis for axis in (1, 2) if torch.rand((), generator=generator) < 0.5]
            images = self.images[chosen].flip([axis + 1 for axis in flips])
            yield (step + 1) / (epochs * steps), images, self.masks[chosen].flip(flips)

    def score(self, model: nn.Module) -> float:
        """Mean IoU on the test images."""
        return mean_iou(model, self.test_images, self.test_masks)


class Distillation:
    """ADA between the decoder features of a network and of its frozen float ``teacher``, at a fixed gradient ratio."""

    def __init__(self, teacher: nn.Module, divergence: str) -> None:
        self.teacher = teacher.eval()
        self.alignment = AttentionAlignment(divergence=divergence)
        self.weight: float | None = None

    def __call__(self, images: Tensor, features: list[Tensor], task_loss: Tensor) -> Tensor:
        with torch.no_grad():
            _, theirs = self.teacher.features(images)
        loss = self.alignment(dict(enumerate(features)), dict(enumerate(theirs)), {})
        if self.weight is None:
            norms = [
                torch.cat([g.flatten() for g in torch.autograd.grad(value, features, retain_graph=True)]).norm()
                for value in (task_loss, loss)
            ]
            self.weight = float(ADA_GRADIENT_RATIO * norms[0] / norms[1].clamp_min(1e-12))
        return loss * self.weight


def train(model: nn.Module, task: Task, epochs: int, rate: float, distillation: Distillation | None = None) -> None:
    """SGD with a rate that falls to zero; GABFusion's schedule where the model has fusion nodes."""
    optimizer = build_optimizer(model, "SGD", lr=rate, momentum=0.9)
    model.train()
    for progress, images, masks in task.batches(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - progress)
        set_strength(model, strength_at(progress))
        scores, features = model.features(images)
        loss = nn.functional.cross_entropy(scores, masks)
        total = loss + penalty(model)
        if distillation is not None:
            total = total + distillation(images, features, loss)
        optimizer.zero_grad()
        total.backward()
        update_balance(model)
        optimizer.step()
    set_strength(model, 0.0)


def quantized_row(start: UNet, task: Task, method: str, bits: int, variant: str, epochs: int) -> tuple[float, float]:
    """Mean IoU after calibration and after training of one row and seed."""
    balance = {"feedback": "feedback", "backward": "backward"}.get(variant, variant.startswith("gabfusion"))
    model = prepare(copy.deepcopy(start), build_config(method, bits, gabfusion=balance), task.images[:1])
    calibrate(model, [task.images[:64]])
    reestimate_norms(model, task.images[:128].split(BATCH))
    calibrated = task.score(model)
    distillation = Distillation(copy.deepcopy(start), variant[-2:]) if "ada" in variant else None
    train(model, task, epochs, 0.02, distillation)
    reestimate_norms(model, task.images[:128].split(BATCH))
    return calibrated, task.score(model)


def rows(methods: list[str], bits: list[int]) -> list[tuple[str, int, str]]:
    """(method, bits, variant): every variant for LSQ; for the others what tells of the divergence, at 3 bits."""
    found = [("lsq", *row) for row in itertools.product(bits, VARIANTS)] if "lsq" in methods else []
    others = [method for method in methods if method != "lsq"]
    return found + [(m, 3, v) for m in others for v in ("base", "gabfusion", "ada kl", "ada js") if 3 in bits]


def study(methods: list[str], bits: list[int], seeds: int, epochs: int, float_epochs: int) -> dict[tuple, list[float]]:
    """Row -> mean IoU in points, one a seed. Keys: ("float",), (bits, "calibrated"), (method, bits, variant)."""
    images, masks = dataset(TRAIN_IMAGES, 0)
    test_images, test_masks = dataset(TEST_IMAGES, 1)
    found: dict[tuple, list[float]] = {}
    for seed in range(seeds):
        task = Task(images, masks, test_images, test_masks, seed)
        torch.manual_seed(seed)
        start = UNet()
        train(start, task, float_epochs, 0.1)
        longer = copy.deepcopy(start)
        train(longer, task, epochs, 0.02)
        found.setdefault(("float",), []).append(100 * task.score(longer))
        for method, width, variant in rows(methods, bits):
            began = time.perf_counter()
            calibrated, trained = quantized_row(start, task, method, width, variant, epochs)
            if variant == "base":
                found.setdefault((method, width, "calibrated"), []).append(100 * calibrated)
            found.setdefault((method, width, variant), []).append(100 * trained)
            LOGGER.info(
                f"seed {seed} {method} {width} bit {variant}: {100 * trained:.2f} "
                f"({100 * calibrated:.2f} calibrated), {time.perf_counter() - began:.0f} s"
            )
    return found


def table(found: dict[tuple, list[float]]) -> list[str]:
    """Markdown lines: mean, spread, and the paired difference from the row without the studied part."""
    lines = ["| network | mean IoU | spread | gap to float | gain over base |", "|---" * 5 + "|"]
    reference = found["float",]

    def against(values: list[float], others: list[float]) -> str:
        differences = [a - b for a, b in zip(values, others, strict=True)]
        spread = f" +- {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
        return f"{statistics.fmean(differences):+.2f}{spread}"

    for key, values in found.items():
        name = "float" if key == ("float",) else f"{key[0]} {key[1]} bit {key[2]}"
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        gap = "" if key == ("float",) else against(values, reference)
        studied = len(key) == 3 and key[2] not in ("base", "calibrated")
        gain = against(values, found[(*key[:2], "base")]) if studied else ""
        lines.append(f"| {name} | {statistics.fmean(values):.2f} | {spread} | {gap} | {gain} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the quantized phase")
    parser.add_argument("--float-epochs", type=int, default=FLOAT_EPOCHS)
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args(arguments)
    found = study(options.methods, options.bits, options.seeds, options.epochs, options.float_epochs)
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    lines = [
        "## Segmentation: a U-Net on drawn shapes",
        "",
        f"`python benchmarks/segmentation.py {given}`".rstrip("` ") + "`",
    ]
    lines += [
        "",
        f"{date.today().isoformat()}, {machine()}. {TRAIN_IMAGES} images of {SIZE} x {SIZE} pixels, "
        f"{options.float_epochs} float and {options.epochs} quantized epochs, {options.seeds} seeds (each with a float "
        "network of its own). Points of mean IoU over the three foreground classes; +- is the standard deviation over "
        "seeds, of the paired difference in the last two columns. ADA's gradient is "
        f"{ADA_GRADIENT_RATIO:.0%} of the task's at the first batch.",
        "",
        *table(found),
    ]
    write_section("segmentation", lines, options.document)
    LOGGER.info("\n".join(lines))


if __name__ == "__main__":
    main()
