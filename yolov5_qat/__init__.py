"""What ``pip install .`` adds to the tree: one package that holds all of it, and commands that start its scripts.

A checkout has folders called ``models``, ``utils`` and ``data``, as YOLOv5's does, and imports them by these names. In
``site-packages`` they would collide with everybody else's, so a wheel has them below ``yolov5_qat/tree``, where nothing
finds them until this package is imported: that puts the folder in front of ``sys.path``. The commands do so in a
process of their own. A program of yours that imports ``yolov5_qat`` gets our ``models`` and ``utils`` from then on, so
it can have none of its own under these names; if it has loaded some already, the import says so.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

HERE = Path(__file__).resolve().parent
TREE = HERE / "tree" if (HERE / "tree").is_dir() else HERE.parent  # installed, or in a checkout
NAMES = ("data", "exporting", "models", "quant", "run_report", "training", "utils", "train", "val", "detect", "export")


def _is_foreign(name: str) -> bool:
    """Whether a module called ``name`` is loaded that does not lie in ``TREE``."""
    module = sys.modules.get(name)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", [])]
    return module is not None and not any(place and TREE in Path(place).resolve().parents for place in places)


def _enter() -> None:
    """Puts ``TREE`` in front of ``sys.path``.

    Raises:
        ImportError: the program has loaded other modules under names of ours.
    """
    foreign = [name for name in NAMES if _is_foreign(name)]
    if foreign:
        raise ImportError(
            f"yolov5_qat has modules called {', '.join(foreign)}, and this program has loaded others of that name. "
            "Start yolov5-qat-train, -val, -detect or -export in a process of its own, or run the exported file, which "
            "needs nothing of this project"
        )
    if str(TREE) not in sys.path:
        sys.path.insert(0, str(TREE))


_enter()
