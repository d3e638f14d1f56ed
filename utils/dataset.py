"""The data set: images and labels from disk to the batches that the model is trained and validated on.

Every random choice comes from a generator seeded by (seed, epoch, index), so an epoch is the same whatever the number
of workers, and a run that is resumed at an epoch sees what an uninterrupted one would have seen.
"""

import os
import signal
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from utils import augment as augmentation
from utils.boxes import xyxy_to_xywhn
from utils.canvas import Canvas, Tile
from utils.errors import UserError
from utils.image_cache import ImageCache, cache_in_memory, cache_on_disk, digest_of
from utils.images import letterbox, read_image, resize_to_long_side, shape_at_long_side
from utils.label_cache import cache_candidates
from utils.labels import label_folder, read_labelled_images
from utils.log import LOGGER
from utils.packed import PackedTexts
from utils.polygons import has_polygons, polygons_of

# Tags keep the streams of different purposes apart where seed, epoch and index are the same.
AUGMENT_STREAM, SHUFFLE_STREAM = 1, 2

Shapes = tuple[tuple[int, int], tuple[tuple[float, float], tuple[float, float]]]
Item = tuple[torch.Tensor, torch.Tensor, str, Shapes | None]


def rect_batch_shapes(
    aspect_ratios: np.ndarray, batch_index: np.ndarray, image_size: int, stride: int, pad: float
) -> np.ndarray:
    """The (height, width) of each batch of images of similar proportions.

    Args:
        aspect_ratios: (images,) height / width.
        batch_index: (images,) the batch that an image belongs to, from 0, ascending.
        pad: in strides; validation adds half a stride, so the long side of 640 becomes 672.

    Returns:
        (batches, 2) int: multiples of ``stride`` that hold every image of the batch at ``image_size``.
    """
    # The batches lie one behind the other; a search for each one's images would be quadratic in their number.
    starts = np.flatnonzero(np.diff(batch_index, prepend=-1))
    lowest, highest = np.minimum.reduceat(aspect_ratios, starts), np.maximum.reduceat(aspect_ratios, starts)
    shapes = np.ones((len(starts), 2))
    shapes[:, 0] = np.where(highest < 1, highest, 1)
    shapes[:, 1] = np.where(lowest > 1, 1 / lowest, 1)
    return np.ceil(shapes * image_size / stride + pad).astype(int) * stride


class DetectionDataset(Dataset):
    """Images with their boxes.

    Attributes:
        image_files: paths of the usable images (with ``rect`` sorted by height / width).
        labels: float32 (n, 5) arrays: class, normalised xywh.
        shapes: (images, 2) width, height of the files.
        batch_shapes: (batches, 2) height, width with ``rect``, else None.
        mosaic: whether mosaics are made; the trainer may switch it off.

    Args:
        path_spec: folder, list file or a list of those, as in a data set YAML.
        image_size: the longer side of an image, in pixels; the side of the square batch unless ``rect``.
        batch_size: only ``rect`` needs it.
        hyp: augmentation gains by their YOLOv5 names; needed with ``augment``.
        augment: training's augmentations. ``rect`` keeps them but for the mosaic.
        cache: 'ram' keeps the resized images in memory, 'disk' in a file beside the labels (or the user's cache
            folder) that later runs use too. Where they do not fit, a warning says so and nothing is kept.
        single_class: every label becomes class 0.
        num_classes: labels with a class from here up are refused.
        copies: how many processes will hold the images that are cached in memory.

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
        copies: int = 1,
    ) -> None:
        if augment and hyp is None:
            raise ValueError("augment needs hyp")
        self.image_size, self.hyp, self.augment, self.rect = image_size, dict(hyp or {}), augment, rect
        self.prefix, self.seed, self.epoch = prefix, seed, 0
        self.mosaic = augment and not rect
        found = read_labelled_images(path_spec, prefix)
        self.image_files, self.labels, self.shapes = found.images, found.labels, found.sizes
        if augment and self.hyp.get("copy_paste") and not has_polygons(self.image_files, self.labels):
            LOGGER.warning(f"{prefix}: copy_paste needs polygons in the label files; there are none, it does nothing.")
            self.hyp["copy_paste"] = 0.0
        self._stamps = found.stamps
        self._check_labels(path_spec, None if single_class else num_classes)
        if single_class:
            self.labels.rows[:, 0] = 0
        self.batch_shapes = self.batch_index = None
        if rect:
            self._sort_into_batches(batch_size, stride, pad)
        self._cached: ImageCache | None = None
        if cache:
            self._cached = self._fill_cache(cache, path_spec, copies)

    def _check_labels(self, path_spec, num_classes: int | None) -> None:
        classes = self.labels.rows[:, 0]
        if not len(classes):
            places = path_spec if isinstance(path_spec, str | Path) else ", ".join(map(str, path_spec))
            text = f"{self.prefix}: no labels for the {len(self.labels)} images in {places}."
            if self.augment:
                raise UserError(f"{text} Label files lie in 'labels' where the images lie in 'images'.")
            LOGGER.warning(text)
            return
        worst = int(np.argmax(classes))
        if num_classes is not None and classes[worst] >= num_classes:
            file = self.image_files[self.labels.owner(worst)]
            raise UserError(
                f"{self.prefix}: the label file of {file} has class {int(classes[worst])}, but the "
                f"data set has {num_classes} names (0 to {num_classes - 1}). Correct the label or 'names' in the YAML."
            )

    def _sort_into_batches(self, batch_size: int, stride: int, pad: float) -> None:
        ratios = self.shapes[:, 1] / self.shapes[:, 0]
        # NumPy's default sort, as YOLOv5 v7.0 has it, for the sake of equal figures: which of the images of the same
        # proportions share a batch with others decides about their padding, and moves COCO's mAP by up to 0.005.
        order = ratios.argsort()
        self.image_files = PackedTexts.of(self.image_files[i] for i in order)
        self.labels = self.labels.take(order)
        self.shapes, self._stamps = self.shapes[order], self._stamps[order]
        self.batch_index = np.arange(len(order)) // batch_size
        self.batch_shapes = rect_batch_shapes(ratios[order], self.batch_index, self.image_size, stride, pad)

    # --- images
    def _fill_cache(self, kind: str, path_spec: str | Path | Sequence[str | Path], copies: int) -> ImageCache | None:
        if kind not in ("ram", "disk"):
            raise UserError(f"--cache {kind}: images are cached in memory ('ram') or in a file ('disk').")
        shapes = np.array([shape_at_long_side(h, w, self.image_size) for w, h in self.shapes.tolist()])
        if kind == "ram":
            return cache_in_memory(shapes, self._read, self.prefix, copies)
        smooth = not self.augment
        ending = f".{self.image_size}{'-smooth' if smooth else ''}.images.npy"
        files = cache_candidates(path_spec, label_folder(path_spec, self.image_files[0]), ending)
        digest = digest_of(self.image_files, self._stamps[:, :2], shapes, self.image_size, smooth)
        return cache_on_disk(files, digest, shapes, self._read, self.prefix)

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
        # Three channels beside each other in memory, as OpenCV and channels-last convolutions have them.
        pixels = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
        return pixels, targets, self.image_files[index], shapes

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
            image, rows = augmentation.random_perspective(Canvas.of(image), rows, rng, **warp)
        image = augmentation.shift_hsv(image, rng, *(hyp.get(f"hsv_{letter}", 0.0) for letter in "hsv"))
        return augmentation.flip(image, rows, rng, hyp.get("flipud", 0.0), hyp.get("fliplr", 0.0))

    def _tile(self, index: int) -> Tile:
        """The image of an index, to be loaded only where it is seen."""
        width, height = self.shapes[index].tolist()
        height, width = shape_at_long_side(height, width, self.image_size)
        return Tile(partial(self.load_image, index), width, height, name=self.image_files[index])

    def _mosaic(self, index: int, rng: np.random.Generator, warp: dict) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.permutation([index, *rng.integers(len(self), size=3)])
        tiles, labels = [self._tile(int(i)) for i in chosen], [self.labels[i] for i in chosen]
        canvas, rows = augmentation.mosaic(tiles, labels, self.image_size, rng)
        if self.hyp.get("copy_paste"):
            polygons = []
            for tile, own in zip(canvas.tiles, labels, strict=True):
                scale, corner = np.float32((tile.width, tile.height)), np.float32((tile.left, tile.top))
                found = polygons_of(tile.name, own)
                polygons += [None if polygon is None else polygon * scale + corner for polygon in found]
            whole = canvas.draw(0, 0, canvas.width, canvas.height)
            whole, rows = augmentation.copy_paste(whole, rows, polygons, self.hyp["copy_paste"], rng)
            canvas = Canvas.of(whole)
        return augmentation.random_perspective(canvas, rows, rng, (self.image_size,) * 2, **warp)


# --- loader
class EpochSampler(Sampler):
    """Yields (epoch, index) pairs, shuffled anew but reproducibly in each epoch; each of several ranks gets its share.

    The epoch travels with the index because persistent workers hold a copy of the data set from before the first epoch.
    With several ranks indices repeat, shuffled from the start, otherwise the last one, until every rank has equally
    many; unless ``even`` is false, as for an evaluation, in which each image counts once.

    Attributes:
        weights: (length,) probabilities with a sum of 1 by which indices are drawn with replacement; None: each once.
    """

    def __init__(
        self, length: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1, even: bool = True
    ) -> None:
        self.length, self.shuffle, self.seed, self.even = length, shuffle, seed, even
        self.weights: np.ndarray | None = None
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        missing = 0 if self.even else self.rank  # the first ranks have one more where it does not come out even
        return -(-(self.length - missing) // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        rng = np.random.default_rng([self.seed, self.epoch, 0, SHUFFLE_STREAM])
        if self.weights is not None:
            order = rng.choice(self.length, self.length, p=self.weights)
        elif self.shuffle:
            rng.shuffle(order)
        if self.even:
            whole = len(self) * self.world_size
            # Rectangular batches: the first images have other shapes than the last batch.
            order = np.resize(order, whole) if self.shuffle else np.pad(order, (0, whole - len(order)), "edge")
        epoch = self.epoch
        return ((epoch, int(index)) for index in order[self.rank :: self.world_size])


class DetectionLoader(DataLoader):
    """A DataLoader whose ``set_epoch`` chooses the epoch that the next iteration shuffles and augments by."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator:
        """The batches of an epoch.

        Raises:
            UserError: an image cannot be read any more, or a worker process was killed.
        """
        try:
            yield from super().__iter__()
        except UserError as error:
            # A worker's error arrives with the worker's traceback around its text.
            raise UserError(str(error).strip().rpartition(f"{UserError.__name__}: ")[2]) from None
        except RuntimeError as error:
            if (message := worker_failure(error)) is None:
                raise
            raise UserError(f"{self.dataset.prefix}: {message}") from error


def worker_failure(error: RuntimeError) -> str | None:
    """What to say of ``error`` if it is PyTorch's about a worker process that was killed, else None."""
    if "DataLoader worker" not in str(error):
        return None
    return (
        f"a process that loads images has died ({str(error).splitlines()[0].rstrip('. ')}). Most likely memory or "
        "/dev/shm ran out: use fewer --workers (0 loads in the main process), or do without --cache ram"
    )


def collate(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor, list[str], list[Shapes | None]]:
    """Items to a batch: uint8 (batch, 3, h, w), channels last in memory; targets (n, 6) with the image's position in
    column 0; paths; shapes."""
    images, targets, paths, shapes = zip(*items, strict=True)
    for position, rows in enumerate(targets):
        rows[:, 0] = position
    # Inside of a worker default_collate stacks straight into shared memory, which spares a copy of the batch.
    pixels = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return pixels, torch.cat(targets), list(paths), list(shapes)


def collate_quads(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor, list[str], list[None]]:
    """Every four items to one image of twice the side, by chance the four of them (left above, left below, right above,
    right below) or the first one enlarged; otherwise as ``collate``. A last group is filled up from the batch's start.

    The four keep objects small where the network sees more of them at once; the enlarged one shows large ones.
    Chance comes from the first image's pixels, so that it depends neither on the workers nor on the batch before.
    """
    items = [items[position % len(items)] for position in range(-(-len(items) // 4) * 4)]
    quads = []
    for first in range(0, len(items), 4):
        group = items[first : first + 4]
        image, rows, path, _ = group[0]
        if zlib.crc32(np.ascontiguousarray(image.permute(1, 2, 0))) & 1:
            size = 2 * image.shape[2], 2 * image.shape[1]
            large = cv2.resize(image.permute(1, 2, 0).numpy(), size, interpolation=cv2.INTER_LINEAR)
            image, rows = torch.from_numpy(large).permute(2, 0, 1), rows.clone()
        else:
            above, below, above_right, below_right = (item[0] for item in group)
            image = torch.cat((torch.cat((above, below), 1), torch.cat((above_right, below_right), 1)), 2)
            places = torch.tensor([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
            moved = [item[1].clone() for item in group]
            for part, place in zip(moved, places, strict=True):
                part[:, 2:4] += place
                part[:, 2:] /= 2
            rows = torch.cat(moved)
        quads.append((image, rows, path, None))
    return collate(quads)


def _start_worker(_worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too; the main process ends them
    sys.excepthook = _report_unless_left


def _report_unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker whose main process ends while it hands over a batch has nothing to report."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


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
    even: bool = True,
    quad: bool = False,
) -> tuple[DetectionLoader, DetectionDataset]:
    """A loader and its data set; the arguments are those of ``DetectionDataset`` and:

    Args:
        batch_size: images per batch of this process.
        workers: at most so many processes; fewer where there are fewer processors, none for batches of one image.
        shuffle: a new order in each epoch (see ``DetectionLoader.set_epoch``); ignored with ``rect``.
        rank, world_size: this process and how many share the data set; their batches together have one shape.
        quad: join images by fours; see ``collate_quads``.
        even: all of them get equally many images, see ``EpochSampler``.

    Yields batches as ``collate`` describes them.
    """
    if rect and shuffle:
        LOGGER.warning(f"{prefix}: rectangular batches keep their order, images are not shuffled.")
        shuffle = False
    processors = (os.cpu_count() or 1) // max(torch.cuda.device_count(), 1)
    workers = min(max(processors, 1), batch_size if batch_size > 1 else 0, workers)
    # Workers never touch the accelerator, so forking is safe, and the cached images are shared instead of copied.
    context = "fork" if workers and sys.platform == "linux" else None
    copies = world_size * (1 if context else 1 + workers)
    dataset = DetectionDataset(
        path_spec, image_size, batch_size * world_size, hyp, augment, rect, cache, single_class, stride, pad, prefix,
        seed, num_classes, copies,
    )  # fmt: skip
    sampler = EpochSampler(len(dataset), shuffle, seed, rank, world_size, even)
    batch_size = max(min(batch_size, len(sampler)), 1)
    workers = min(workers, batch_size if batch_size > 1 else 0)
    context = context if workers else None
    if not workers:
        cv2.setNumThreads(0)
    loader = DetectionLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_quads if quad else collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
    )
    return loader, dataset
