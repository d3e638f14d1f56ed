"""What was found on a list of images: as tensors, tables, text, drawn pictures and cut-out objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.boxes import crop_region, xyxy_to_xywh
from utils.drawing import Annotator, class_color
from utils.errors import UserError
from utils.images import write_image
from utils.log import LOGGER
from utils.paths import WORK, increment_path
from utils.results import label_name

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = {
    "xyxy": ("xmin", "ymin", "xmax", "ymax"),
    "xywh": ("xcenter", "ycenter", "width", "height"),
}


class Detections:
    """Detections on n images.

    Attributes:
        images: n arrays (height, width, 3) RGB uint8.
        ims: the same; behind ``render`` the drawn ones, as in YOLOv5.
        xyxy: n tensors (boxes, 6) float32: x1, y1, x2, y2 in pixels of the image, confidence, class.
        names: class index -> name.
        files: n file names; images that came without one are called image0.jpg, image1.jpg ...
        speed: milliseconds per image of preprocess, inference and nms.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        xyxy: Sequence[Tensor],
        names: Mapping[int, str],
        files: Sequence[str],
        speed: Mapping[str, float] | None = None,
    ) -> None:
        self.images, self.xyxy, self.names = list(images), list(xyxy), dict(names)
        self.ims = self.images
        self.files, self.speed = list(files), dict(speed or {})

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Detections]:
        return iter(self.tolist())

    @property
    def pred(self) -> list[Tensor]:
        """YOLOv5's name of ``xyxy``."""
        return self.xyxy

    @property
    def n(self) -> int:
        """YOLOv5's name of ``len``."""
        return len(self)

    @cached_property
    def xywh(self) -> list[Tensor]:
        """As ``xyxy``, with centre x, centre y, width and height in front."""
        return [torch.cat((xyxy_to_xywh(rows[:, :4]), rows[:, 4:]), 1) for rows in self.xyxy]

    @cached_property
    def xyxyn(self) -> list[Tensor]:
        """``xyxy`` as shares of the image's width and height."""
        return self._normalised(self.xyxy)

    @cached_property
    def xywhn(self) -> list[Tensor]:
        """``xywh`` as shares of the image's width and height."""
        return self._normalised(self.xywh)

    def _normalised(self, tables: list[Tensor]) -> list[Tensor]:
        shares = []
        for rows, image in zip(tables, self.images, strict=True):
            height, width = image.shape[:2]
            shares.append(rows / rows.new_tensor((width, height, width, height, 1, 1)))
        return shares

    def tolist(self) -> list[Detections]:
        """One ``Detections`` for each image."""
        parts = zip(self.images, self.xyxy, self.files, strict=True)
        return [Detections([image], [rows], self.names, [file], self.speed) for image, rows, file in parts]

    def pandas(self) -> SimpleNamespace:
        """``xyxy``, ``xyxyn``, ``xywh`` and ``xywhn`` as lists of n tables with a row per box.

        Columns: xmin, ymin, xmax, ymax (or xcenter, ycenter, width, height), confidence, class, name.
        """
        import pandas  # takes a third of a second, and most uses do without

        def table(rows: Tensor, columns: tuple[str, ...]) -> pandas.DataFrame:
            frame = pandas.DataFrame(rows.cpu().numpy(), columns=[*columns, "confidence", "class"])
            frame["class"] = frame["class"].astype(int)
            frame["name"] = [label_name(self.names, label) for label in frame["class"]]
            return frame

        layouts = ("xyxy", "xyxyn", "xywh", "xywhn")
        return SimpleNamespace(
            **{layout: [table(rows, COLUMNS[layout[:4]]) for rows in getattr(self, layout)] for layout in layouts}
        )

    def __str__(self) -> str:
        lines = []
        for number, (image, rows, file) in enumerate(zip(self.images, self.xyxy, self.files, strict=True), 1):
            height, width = image.shape[:2]
            lines.append(f"image {number}/{len(self)} {file}: {height}x{width} {count_text(rows, self.names)}")
        if self.speed:
            parts = ", ".join(f"{value:.1f}ms {name}" for name, value in self.speed.items())
            lines.append(f"Speed: {parts} per image")
        return "\n".join(lines)

    def print(self) -> None:
        """Logs one line per image, and the speed."""
        LOGGER.info(str(self))

    def render(self, labels: bool = True, line_width: int | None = None) -> list[np.ndarray]:
        """Copies of the images with boxes drawn in: n arrays (height, width, 3) RGB uint8."""
        drawn = []
        for image, rows in zip(self.images, self.xyxy, strict=True):
            annotator = Annotator(np.ascontiguousarray(image[..., ::-1]), line_width)
            for *corners, score, label in reversed(rows.tolist()):  # the most confident on top
                caption = f"{label_name(self.names, int(label))} {score:.2f}" if labels else ""
                annotator.box(corners, caption, class_color(int(label)))
            drawn.append(np.ascontiguousarray(annotator.image[..., ::-1]))
        self.ims = drawn
        return drawn

    def pictures(self, labels: bool = True) -> list[Image]:
        """``render`` as PIL images."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.render(labels)]

    def show(self, labels: bool = True) -> None:
        """Opens the drawn images in the system's image viewer (in a notebook: below the cell)."""
        for picture in self.pictures(labels):
            picture.show()

    def save(
        self,
        folder: str | Path | None = None,
        labels: bool = True,
        save_dir: str | Path | None = None,
        exist_ok: bool = False,
    ) -> list[Path]:
        """Writes the drawn images as JPEGs; returns the files.

        Args:
            folder: where to; by default a new folder runs/hub/exp.
            save_dir: as in YOLOv5: where it exists and without ``exist_ok``, save_dir2, save_dir3 ...
        """
        folder = self._folder(folder, save_dir, exist_ok)
        files = []
        for file, image in zip(self._unique_stems(), self.render(labels), strict=True):
            files.append(folder / f"{file}.jpg")
            write_image(files[-1], np.ascontiguousarray(image[..., ::-1]))
        LOGGER.info(f"Saved {len(files)} image{'s' if len(files) != 1 else ''} to {folder}")
        return files

    def crop(
        self,
        folder: str | Path | None = None,
        save: bool = True,
        save_dir: str | Path | None = None,
        exist_ok: bool = False,
    ) -> list[dict]:
        """The objects as pictures of their own, with a little of their surroundings.

        Args:
            folder: files go to <folder>/crops/<class>/<image>_<number>.jpg; by default in a new folder runs/hub/exp.
            save: write files; without it the pictures are only returned.
            save_dir, exist_ok: as of ``save``.

        Returns:
            For each object: box (4,), conf, cls, label, im (RGB array), and file if it was written.
        """
        folder = self._folder(folder, save_dir, exist_ok) if save else None
        crops = []
        for stem, image, rows in zip(self._unique_stems(), self.images, self.xyxy, strict=True):
            for number, row in enumerate(rows, 1):
                name = label_name(self.names, int(row[5]))
                vertical, horizontal = crop_region(row[:4].tolist(), image.shape[:2])
                found = {"box": row[:4], "conf": float(row[4]), "cls": int(row[5]), "im": image[vertical, horizontal]}
                found["label"] = f"{name} {float(row[4]):.2f}"
                if folder is not None:
                    safe = "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in name)
                    found["file"] = folder / "crops" / safe / f"{stem}_{number}.jpg"
                    found["file"].parent.mkdir(parents=True, exist_ok=True)
                    write_image(found["file"], np.ascontiguousarray(found["im"][..., ::-1]))
                crops.append(found)
        return crops

    def _folder(self, folder: str | Path | None, save_dir: str | Path | None, exist_ok: bool) -> Path:
        numbered = save_dir or WORK / "runs" / "hub" / "exp"
        try:
            return increment_path(folder or numbered, exist_ok or folder is not None, make=True)
        except OSError as error:
            raise UserError(f"{folder or numbered}: cannot be made ({error.strerror or error})") from None

    def _unique_stems(self) -> list[str]:
        """Names without suffix; images of one name get a number, so that none overwrites another."""
        seen: dict[str, int] = {}
        stems = []
        for file in self.files:
            stem = Path(file).stem
            seen[stem] = seen.get(stem, 0) + 1
            stems.append(stem if seen[stem] == 1 else f"{stem}_{seen[stem]}")
        return stems


def count_text(rows: Tensor, names: Mapping[int, str]) -> str:
    """Counts by class for the log, such as '2 persons, 1 bus'."""
    labels, counts = rows[:, 5].long().unique(return_counts=True)
    pairs = zip(labels.tolist(), counts.tolist(), strict=True)
    words = (f"{count} {label_name(names, label)}{'s' * (count > 1)}" for label, count in pairs)
    return ", ".join(words) or "(no detections)"
