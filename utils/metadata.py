"""What an exported network says of itself in a YAML file beside it, as YOLOv5 writes it for OpenVINO."""

import ast
from collections.abc import Mapping
from pathlib import Path

import yaml

# YOLOv5's tools read these two as values; everything else is text.
_VALUES = ("stride", "names")


def write_metadata_file(metadata: Mapping[str, str], path: Path) -> None:
    """Writes what an ONNX file's metadata would say; ``stride`` becomes a number, ``names`` a mapping."""
    content = {key: ast.literal_eval(text) if key in _VALUES else text for key, text in metadata.items()}
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_metadata_file(path: Path) -> dict[str, str]:
    """The file's entries as text; none where it is missing or no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}
