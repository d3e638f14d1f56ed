"""What a training run writes down each epoch: results.csv, TensorBoard and, if asked for, Weights & Biases."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from utils.images import read_image
from utils.paths import write_text_at_once
from utils.wandb_log import WandbLog

# Upstream's names and order; columns of the quantized phase follow them.
COLUMNS = (
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",
    "x/lr1",
    "x/lr2",
)
# Ours, after all others: a reader that counts columns still finds upstream's.
LOCALISATION_COLUMNS = (
    "metrics/mAP_0.75",
    "metrics/matched",
    "metrics/matched_IoU",
    "metrics/right_class",
)
WIDTH = 20
PICTURES = ("labels*.jpg", "train_batch*.jpg", "val_batch*.jpg", "*_curve.png", "confusion_matrix.png")


class RunLog:
    """Appends a row per epoch to a CSV file (20-character columns, 5 significant digits) and to TensorBoard.

    Args:
        file: the CSV; rows from ``first_epoch`` on are dropped if it exists (a resumed run writes them again). None: a
            log that keeps nothing, for all processes but the one that writes.
        columns: names between ``COLUMNS`` and ``LOCALISATION_COLUMNS``.
        tensorboard: folder of the event files, or None.
        wandb: gets the same values and pictures, or None.
        prefix: in front of the names that Weights & Biases gets, of a phase that another one follows.
        first_step: added to the epochs there: its steps only rise.
    """

    def __init__(
        self,
        file: Path | None,
        columns: tuple[str, ...] = (),
        first_epoch: int = 0,
        tensorboard: Path | None = None,
        wandb: WandbLog | None = None,
        prefix: str = "",
        first_step: int = 0,
    ) -> None:
        self.wandb, self.prefix, self.first_step = wandb, prefix, first_step
        self.file, self.columns = file, (*COLUMNS, *columns, *LOCALISATION_COLUMNS)
        self.writer = None
        if file is None:
            return
        kept = self._rows_before(first_epoch) if file.exists() and first_epoch > 0 else []
        header = ",".join(f"{name:>{WIDTH}}" for name in ("epoch", *self.columns))
        write_text_at_once(file, "\n".join([header, *kept]) + "\n")
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard))

    def _rows_before(self, epoch: int) -> list[str]:
        """The file's rows of earlier epochs, by name: an older version may have written fewer columns."""
        with self.file.open() as stream:
            rows = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(stream)]
        # A run that was killed while it wrote has a last row that is cut off; that epoch is trained again.
        earlier = [row for row in rows if (row.get("epoch") or "").strip().isdecimal() and int(row["epoch"]) < epoch]
        return [",".join(row.get(name) or " " * WIDTH for name in ("epoch", *self.columns)) for row in earlier]

    def write(self, epoch: int, values: dict[str, float]) -> None:
        """Writes one row; a column without a value stays empty."""
        if self.file is None:
            return
        cells = [f"{epoch:>{WIDTH}}"]
        for name in self.columns:
            cells.append(f"{values[name]:>{WIDTH}.5g}" if name in values else " " * WIDTH)
        with self.file.open("a") as stream:
            stream.write(",".join(cells) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch)
            self.writer.flush()
        if self.wandb is not None:
            named = {f"{self.prefix}{name}": value for name, value in values.items()}
            self.wandb.scalars(named, epoch + self.first_step)

    def pictures(self, folder: Path, epoch: int) -> None:
        """Hands the pictures that lie in a run folder to TensorBoard and Weights & Biases."""
        files = [file for pattern in PICTURES for file in sorted(folder.glob(pattern))]
        if self.writer is not None:
            for file in files:
                rgb = np.ascontiguousarray(read_image(file)[..., ::-1])
                self.writer.add_image(file.stem, rgb, epoch, dataformats="HWC")
        if self.wandb is not None and files:
            self.wandb.pictures(files, epoch + self.first_step)

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self.writer is not None:
            self.writer.close()


def read_results(file: Path) -> list[dict[str, float]]:
    """The rows of a results.csv by stripped column name; empty cells are left out."""
    with file.open() as stream:
        rows = csv.DictReader(stream)
        return [{k.strip(): float(v) for k, v in row.items() if v and v.strip()} for row in rows]
