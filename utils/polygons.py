"""The outlines of objects in label files, for copy-paste; everywhere else their boxes stand for them.

They are read when an image is used, in the process that uses it: kept, those of COCO would take a gigabyte.
"""

from pathlib import Path

import numpy as np

from utils.labels import label_path, parse_labels

CHECKED_FILES = 100


def polygons_of(image_file: str, rows: np.ndarray) -> list[np.ndarray | None]:
    """The outline of every label of an image, or None where its line is a box.

    Args:
        image_file: path.
        rows: (n, 5) its labels, class and normalised xywh, as ``parse_labels`` reads them; classes are not compared.

    Returns:
        n arrays (corners, 2) float32 of normalised x, y.
    """
    try:
        lines = Path(label_path(image_file)).read_text("utf-8-sig", "replace").splitlines()
    except OSError:
        return [None] * len(rows)
    outlines: dict[bytes, np.ndarray] = {}
    for line in lines:
        fields = line.split()
        if len(fields) < 7:  # a class and three corners
            continue
        parsed, _ = parse_labels(line)
        if len(parsed):
            outlines.setdefault(parsed[0, 1:].tobytes(), np.array(fields[1:], np.float32).reshape(-1, 2))
    return [outlines.get(row[1:].tobytes()) for row in np.ascontiguousarray(rows, np.float32)]


def has_polygons(image_files: list[str], labels: list[np.ndarray]) -> bool:
    """Whether one of the first ``CHECKED_FILES`` images has an outline."""
    pairs = zip(image_files[:CHECKED_FILES], labels[:CHECKED_FILES], strict=True)
    return any(outline is not None for file, rows in pairs for outline in polygons_of(file, rows))
