"""The data set: images and labels from disk to the batches that the model is trained and validated on.

Every random choice comes from a generator seeded by (seed, epoch, index), so an epoch is the same whatever the number
of workers, and a run that is resumed at an epoch sees what an uninterrupted one would have seen.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from utils import augment as augmentation
from utils.boxes import xyxy_to_xywhn
from utils.errors import UserError
from utils.images import letterbox, read_image, resize_to_long_side
from utils.labels import READERS, read_labelled_images
from utils.log import LOGGER

# Tags keep the streams of different purposes apart where seed, epoch and index are the same.
AUGMENT_STREAM, SHUFFLE_STREAM = 1, 2

Shapes = tuple[tuple[int, int], tuple[tuple[float, float], tuple[float, float]]]
Item = tuple[torch.Tensor, torch.Tensor, str, Shapes | None]


def rect_batch_shapes(
    aspect_ratios: np.ndarray, batch_index: np.ndarray, image_size: int, stride: int, pad: float
) -> np.ndarray:
    """The (height, width) of each batch of images of similar proportions.

    Args:
        aspect_ratios: (images,) height / width, sorted.
        batch_index: (images,) the batch that an image belongs to.
        pad: in strides; validation adds half a stride, so the long side of 640 becomes 672.

    Returns:
        (batches, 2) int: multiples of ``stride`` that hold every image of the batch at ``image_size``.
    """
    shapes = np.ones((batch_index[-1] + 1, 2))
    for batch in range(len(shapes)):
        ratios = aspect_ratios[batch_index == batch]
        if ratios.max() < 1:
            shapes[batch, 0] = ratios.max()
        elif ratios.min() > 1:
            shapes[batch, 1] = 1 / ratios.min()
    return np.ceil(shapes * image_size / stride + pad).astype(int) * stride


class DetectionDataset(Dataset):
    """Images with their boxes.

    Attributes:
        image_files: paths of the usable images (with ``rect`` sorted by height / width).
        labels: a list of float32 (n, 5) arrays: class, normalised xywh.
        shapes: (images, 2) width, height of the files.
        batch_shapes: (batches, 2) height, width with ``rect``, else None.
        mosaic: whether mosaics are made; the trainer may switch it off.

    Args:
        path_spec: folder, list file or a list of those, as in a data set YAML.
        image_size: the longer side of an image, in pixels; the side of the square batch unless ``rect``.
        batch_size: only ``rect`` needs it.
        hyp: augmentation gains by their YOLOv5 names; needed with ``augment``.
        augment: training's augmentations. ``rect`` keeps them but for the mosaic.
        cache: 'ram' keeps the resized images in memory.
        single_class: every label becomes class 0.
        num_classes: labels with a class from here up are refused.

    Raises:
        UserError: no usable images, training without any label, a class out of range.
    """

    def __init__(
        self,
        path_spec: str | Path | Sequence[str | Path],
        image_size: int = 640,
        batch_size: int = 16,
        hyp: Mapping[str, float] | None = None,
        augment: bool = False,
        rect: bool = False,
        cache: str | None = None,
        single_class: bool = False,
        stride: int = 32,
        pad: float = 0.0,
        prefix: str = "train",
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        if augment and hyp is None:
            raise ValueError("augment needs hyp")
        self.image_size, self.hyp, self.augment, self.rect = image_size, dict(hyp or {}), augment, rect
        self.prefix, self.seed, self.epoch = prefix, seed, 0
        self.mosaic = augment and not rect
        if augment and self.hyp.get("copy_paste"):
            LOGGER.warning(f"{prefix}: copy_paste needs polygons, labels are kept as boxes: it does nothing.")
        found = read_labelled_images(path_spec, prefix)
        self.image_files, self.labels, self.shapes = found.images, found.labels, found.sizes
        self._check_labels(path_spec, None if single_class else num_classes)
        if single_class:
            self.labels = [np.concatenate([np.zeros_like(rows[:, :1]), rows[:, 1:]], 1) for rows in self.labels]
        self.batch_shapes = self.batch_index = None
        if rect:
            self._sort_into_batches(batch_size, stride, pad)
        self._cached: list[np.ndarray] | None = None
        if cache:
            self._fill_cache(cache)

    def _check_labels(self, path_spec, num_classes: int | None) -> None:
        if not any(map(len, self.labels)):
            text = f"{self.prefix}: no labels for the {len(self.labels)} images in {path_spec}."
            if self.augment:
                raise UserError(f"{text} Label files lie in 'labels' where the images lie in 'images'.")
            LOGGER.warning(text)
            return
        highest = [rows[:, 0].max(initial=-1) for rows in self.labels]
        worst = int(np.argmax(highest))
        if num_classes is not None and highest[worst] >= num_classes:
            raise UserError(
                f"{self.prefix}: the label file of {self.image_files[worst]} has class {int(highest[worst])}, but the "
                f"data set has {num_classes} names (0 to {num_classes - 1}). Correct the label or 'names' in the YAML."
            )

    def _sort_into_batches(self, batch_size: int, stride: int, pad: float) -> None:
        ratios = self.shapes[:, 1] / self.shapes[:, 0]
        # NumPy's default sort, as YOLOv5 v7.0 has it, for the sake of equal figures: which of the images of the same
        # proportions share a batch with others decides about their padding, and moves COCO's mAP by up to 0.005.
        order = ratios.argsort()
        self.image_files = [self.image_files[i] for i in order]
        self.labels = [self.labels[i] for i in order]
        self.shapes = self.shapes[order]
        self.batch_index = np.arange(len(order)) // batch_size
        self.batch_shapes = rect_batch_shapes(ratios[order], self.batch_index, self.image_size, stride, pad)

    # --- images
    def _fill_cache(self, cache: str) -> None:
        if cache != "ram":
            raise UserError(f"--cache {cache}: images are cached in memory only. Use --cache ram, or leave it away.")
        scaled = self.shapes * (self.image_size / self.shapes.max(1, keepdims=True))
        needed, available = 3 * float(scaled.prod(1).sum()), available_memory()
        if available is not None and needed > 0.8 * available:
            LOGGER.warning(
                f"{self.prefix}: images are not cached, they need {needed / 2**30:.1f} GiB of memory and "
                f"{available / 2**30:.1f} GiB are free."
            )
            return
        with ThreadPoolExecutor(READERS) as pool:
            images = pool.map(self._read, range(len(self)))
            self._cached = list(tqdm(images, f"{self.prefix}: caching images", len(self), delay=2, leave=False))
        size = sum(image.nbytes for image in self._cached)
        LOGGER.info(f"{self.prefix}: {len(self)} images cached in memory, {size / 2**20:.0f} MiB")

    def _read(self, index: int) -> np.ndarray:
        return resize_to_long_side(read_image(self.image_files[index]), self.image_size, smooth=not self.augment)

    def load_image(self, index: int) -> np.ndarray:
        """BGR uint8 (height, width, 3) with a long side of ``image_size``. Cached images must not be written to."""
        return self._read(index) if self._cached is None else self._cached[index]

    # --- items
    def set_epoch(self, epoch: int) -> None:
        """The epoch that a plain index ``dataset[i]`` belongs to; loaders send it along with the index instead."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.image_files)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        """The image of an index, or of (epoch, index).

        Returns:
            RGB uint8 (3, height, width); labels float32 (n, 6) of 0, class, normalised xywh; the path; and
            ``((height, width), ((ratio_h, ratio_w), (pad_w, pad_h)))`` to scale boxes back, or None if augmented.
        """
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if self.augment:
            rng = np.random.default_rng([self.seed, epoch, index, AUGMENT_STREAM])
            image, rows = self._augmented(index, rng)
            shapes = None
        else:
            image, rows, shapes = self._letterboxed(index)
        targets = torch.zeros(len(rows), 6)
        if len(rows):
            height, width = image.shape[:2]
            boxes = xyxy_to_xywhn(rows[:, 1:], width, height, clip=True, margin=1e-3)
            targets[:, 1:] = torch.from_numpy(np.concatenate([rows[:, :1], boxes], 1))
        planes = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
        return torch.from_numpy(planes), targets, self.image_files[index], shapes

    def _letterboxed(self, index: int) -> tuple[np.ndarray, np.ndarray, Shapes]:
        """One image padded to its batch's shape; its rows (n, 5) in pixels; what scales them back."""
        image = self.load_image(index)
        height, width = image.shape[:2]
        shape = (self.image_size,) * 2 if self.batch_index is None else self.batch_shapes[self.batch_index[index]]
        image, ratios, padding = letterbox(image, tuple(map(int, shape)), auto=False, scale_up=self.augment)
        rows = augmentation.denormalise_labels(self.labels[index], ratios[0] * width, ratios[1] * height, *padding)
        native_width, native_height = map(int, self.shapes[index])
        shapes = (native_height, native_width), ((height / native_height, width / native_width), padding)
        return image, rows, shapes

    def _augmented(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        hyp = self.hyp
        warp = {key: hyp.get(key, 0.0) for key in ("degrees", "translate", "scale", "shear", "perspective")}
        if self.mosaic and rng.random() < hyp.get("mosaic", 0.0):
            image, rows = self._mosaic(index, rng, warp)
            if rng.random() < hyp.get("mixup", 0.0):
                image, rows = augmentation.mixup(
                    image, rows, *self._mosaic(int(rng.integers(len(self))), rng, warp), rng
                )
        else:
            image, rows, _ = self._letterboxed(index)
            image, rows = augmentation.random_perspective(image, rows, rng, **warp)
        image = augmentation.shift_hsv(image, rng, *(hyp.get(f"hsv_{letter}", 0.0) for letter in "hsv"))
        return augmentation.flip(image, rows, rng, hyp.get("flipud", 0.0), hyp.get("fliplr", 0.0))

    def _mosaic(self, index: int, rng: np.random.Generator, warp: dict) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.permutation([index, *rng.integers(len(self), size=3)])
        images, labels = [self.load_image(i) for i in chosen], [self.labels[i] for i in chosen]
        canvas, rows = augmentation.mosaic(images, labels, self.image_size, rng)
        return augmentation.random_perspective(canvas, rows, rng, (self.image_size,) * 2, **warp)


def available_memory() -> int | None:
    """Bytes of memory that a process can still take, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as stream:
            lines = dict(line.split(":") for line in stream)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


# --- loader
class EpochSampler(Sampler):
    """Yields (epoch, index) pairs, shuffled anew but reproducibly in each epoch; each of several ranks gets its share.

    The epoch travels with the index because persistent workers hold a copy of the data set from before the first epoch.
    With several ranks indices repeat from the start until every rank has equally many.
    """

    def __init__(self, length: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch, 0, SHUFFLE_STREAM]).shuffle(order)
        order = np.resize(order, len(self) * self.world_size)
        epoch = self.epoch
        return iter([(epoch, int(index)) for index in order[self.rank :: self.world_size]])


class DetectionLoader(DataLoader):
    """A DataLoader whose ``set_epoch`` chooses the epoch that the next iteration shuffles and augments by."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)
        self.dataset.set_epoch(epoch)


def collate(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor, list[str], list[Shapes | None]]:
    """Items to a batch: uint8 (batch, 3, h, w); targets (n, 6) with the image's position in column 0; paths; shapes."""
    images, targets, paths, shapes = zip(*items, strict=True)
    for position, rows in enumerate(targets):
        rows[:, 0] = position
    return torch.stack(images), torch.cat(targets), list(paths), list(shapes)


def _start_worker(_worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism


def create_dataloader(
    path_spec: str | Path | Sequence[str | Path],
    image_size: int,
    batch_size: int,
    stride: int = 32,
    single_class: bool = False,
    hyp: Mapping[str, float] | None = None,
    augment: bool = False,
    cache: str | None = None,
    pad: float = 0.0,
    rect: bool = False,
    workers: int = 8,
    prefix: str = "train",
    shuffle: bool = False,
    seed: int = 0,
    num_classes: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[DetectionLoader, DetectionDataset]:
    """A loader and its data set; the arguments are those of ``DetectionDataset`` and:

    Args:
        batch_size: images per batch of this process.
        workers: at most so many processes; fewer where there are fewer processors, none for batches of one image.
        shuffle: a new order in each epoch (see ``DetectionLoader.set_epoch``); ignored with ``rect``.
        rank, world_size: this process and how many share the data set.

    Yields batches as ``collate`` describes them.
    """
    if rect and shuffle:
        LOGGER.warning(f"{prefix}: rectangular batches keep their order, images are not shuffled.")
        shuffle = False
    dataset = DetectionDataset(
        path_spec,
        image_size,
        batch_size,
        hyp,
        augment,
        rect,
        cache,
        single_class,
        stride,
        pad,
        prefix,
        seed,
        num_classes,
    )
    batch_size = min(batch_size, len(dataset))
    processors = (os.cpu_count() or 1) // max(torch.cuda.device_count(), 1)
    workers = min(max(processors, 1), batch_size if batch_size > 1 else 0, workers)
    if not workers:
        cv2.setNumThreads(0)
    # Workers never touch the accelerator, so forking is safe, and the cached images are shared instead of copied.
    context = "fork" if workers and sys.platform == "linux" else None
    loader = DetectionLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), shuffle, seed, rank, world_size),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
    )
    return loader, dataset
