"""Exported files appear under their name only when they have been written whole and compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.verify import Verification
from utils.errors import UserError


@contextmanager
def kept_when_whole(target: Path) -> Iterator[Path]:
    """A file beside ``target`` that takes its name when the block ends, and is gone if it fails.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_difference(result: Verification, target: Path) -> None:
    """Raises UserError with the table of ``result`` unless the file computes what the network does."""
    if not result.holds:
        raise UserError(f"{target}: not written, it does not compute what the network does\n{result.table()}")
