"""The settings of non-maximum suppression that an exported file carries in its graph, and says in its metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from utils.errors import UserError

METADATA_KEY = "nms"


@dataclass(frozen=True)
class Suppression:
    """The settings that a file with suppression in its graph was written with.

    Attributes:
        confidence: boxes with objectness * class score up to here are dropped.
        iou: a box that overlaps a better one of its class by more is dropped.
        max_detections: rows of the table.
        agnostic: boxes suppress each other across classes.
    """

    confidence: float = 0.25
    iou: float = 0.45
    max_detections: int = 300
    agnostic: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--conf-thres", self.confidence), ("--iou-thres", self.iou)):
            if not 0 <= value <= 1:
                raise UserError(f"{flag} {value}: must lie between 0 and 1")
        if self.max_detections < 1:
            raise UserError(f"--max-det {self.max_detections}: at least 1 is needed")

    def to_metadata(self) -> dict[str, str]:
        """An entry of a file's metadata."""
        return {METADATA_KEY: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Suppression | None":
        """What ``to_metadata`` wrote, or None where there is nothing (readable) of it."""
        try:
            values = json.loads(metadata[METADATA_KEY])
            kinds = {"confidence": float, "iou": float, "max_detections": int, "agnostic": bool}
            return cls(**{name: kind(values[name]) for name, kind in kinds.items()})
        except (KeyError, ValueError, TypeError):
            return None
