"""Progress bars: on a terminal, for what takes more than two seconds; elsewhere nothing is drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

DELAY = 2.0  # seconds
COUNTED = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
OPEN = "{desc}: {n_fmt} [{elapsed}]"  # of things whose number is not known
BYTES = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}B/{total_fmt}B [{remaining}, {rate_fmt}]"


def progress(items: Iterable | None = None, label: str = "", total: int | None = None, **keywords: Any) -> tqdm:
    """``items`` one by one under a bar as wide as the terminal, which goes away at the end.

    Args:
        items: without any, the bar is a context manager whose ``update`` counts.
        label: in front of the bar, a few words.
        total: number of items, where ``items`` has no length.
        keywords: for tqdm; ``unit="B"`` counts bytes.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    shape = OPEN if total is None else COUNTED
    if keywords.get("unit") == "B" and total is not None:
        keywords |= {"unit_scale": True, "unit_divisor": 1000}
        shape = BYTES
    return tqdm(
        items, label, total, leave=False, disable=not bars_are_shown(), dynamic_ncols=True, delay=DELAY,
        bar_format=shape, **keywords,
    )  # fmt: skip


def bars_are_shown() -> bool:
    """Whether bars are drawn: on a terminal, and of a torchrun job by the first process."""
    return sys.stderr.isatty() and int(os.environ.get("RANK", "0")) == 0
