"""What runs leave on disk: the newest trained weights, and detections as label files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from utils.boxes import xyxy_to_xywhn
from utils.errors import UserError
from utils.paths import WORK


def newest_weights(folder: Path | None = None) -> Path:
    """The ``best.pt`` written last in any run under ``folder``, by default runs/train.

    Raises:
        UserError: there is none.
    """
    folder = WORK / "runs" / "train" if folder is None else folder
    files = sorted(folder.glob("**/weights/best.pt"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise UserError(f"no --weights given and no best.pt under {folder}: train first or name a file")
    return files[-1]


def label_name(names: Mapping[int, str], label: int) -> str:
    """Name of a class, or its number where ``names`` does not go so far."""
    return str(names.get(label, label))


def save_text(
    folder: Path,
    image: str | Path,
    detections: Tensor,
    size: Sequence[int],
    confidence: bool,
    suffix: str = "",
    layout: str = "normalised",
) -> None:
    """Writes detections of one image as label lines to ``<image's stem><suffix>.txt``; nothing where none was found.

    Args:
        detections: (n, 6) x1, y1, x2, y2 in pixels of the image, confidence, class.
        size: (height, width, ...) of the image.
        confidence: add it as the sixth column.
        layout: "normalised" is YOLO's class, centre x, centre y, width, height in 0..1; "corners" is class and
            x1, y1, x2, y2 in pixels.
    """
    if not len(detections):
        return
    height, width = size[:2]
    boxes = detections[:, :4] if layout == "corners" else xyxy_to_xywhn(detections[:, :4], width, height)
    lines = []
    for box, (score, label) in zip(boxes.tolist(), detections[:, 4:6].tolist(), strict=True):
        values = (*box, score) if confidence else box
        lines.append(" ".join([str(int(label)), *(f"{value:g}" for value in values)]))
    (folder / f"{Path(image).stem}{suffix}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
