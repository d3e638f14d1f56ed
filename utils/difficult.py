"""Objects that an annotator marked as difficult: PASCAL VOC trains without them and leaves them out of its scores.

They lie apart from the labels, one file an image: ``images/val/a.jpg`` has its labels in ``labels/val/a.txt`` and its
difficult objects in ``difficult/val/a.txt``, in the same format. A data set without the folder has none.
"""

from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.labels import parse_labels

FOLDER = "difficult"


def difficult_path(image_path: str | Path) -> Path:
    """The file of an image's difficult objects: its last ``images`` folder replaced, its suffix .txt."""
    parts = list(Path(image_path).parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = FOLDER
            return Path(*parts).with_suffix(".txt")
    return Path(image_path).parent / FOLDER / f"{Path(image_path).stem}.txt"


def read_difficult(image_path: str | Path) -> np.ndarray:
    """The difficult objects of an image, (n, 5) float32 of class and normalised xywh.

    Raises:
        UserError: the file is there but cannot be read, or holds a line that is no label.
    """
    file = difficult_path(image_path)
    try:
        rows, problems = parse_labels(file.read_text("utf-8-sig", "replace"), str(file))
    except FileNotFoundError:
        return np.zeros((0, 5), np.float32)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from None
    problems = [problem for problem in problems if not problem.endswith("repeats an earlier line")]
    if problems:
        raise UserError(f"{problems[0]}. Correct the file of difficult objects: evaluation would count them as errors.")
    return rows
