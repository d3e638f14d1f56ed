"""Where things are: the code, runs and data sets, numbered run folders, files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the code and the YAMLs that come along
# Runs and data sets go beside the code in a checkout, but into the current folder where pip has installed it.
WORK = ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()


def increment_path(path: str | Path, exist_ok: bool = False, make: bool = False) -> Path:
    """Returns ``path``, or the first free one of ``path2``, ``path3`` ... if it exists and ``exist_ok`` is false.

    With ``make`` the folder is created before it is returned, atomically: two runs that start together get two folders.
    """
    path = Path(path)
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}{number}")
        if exist_ok or not candidate.exists():
            if not make:
                return candidate
            try:
                candidate.mkdir(parents=True, exist_ok=exist_ok)
                return candidate
            except FileExistsError:
                pass
        number += 1


def results_folder(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """Makes the folder of ``--project`` and ``--name``, numbered as by ``increment_path``.

    Raises:
        UserError: it cannot be made.
    """
    place = Path(project) / name
    try:
        return increment_path(place, exist_ok, make=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or place}: the folder of the results cannot be made ({error.strerror or error}). "
            "Choose a place that can be written to with --project and --name"
        ) from None


@contextmanager
def working_in(folder: str | None) -> Iterator[None]:
    """Relative paths are those below ``folder`` inside the block, if it is there."""
    before = os.getcwd()
    if folder and os.path.isdir(folder):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_text_at_once(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is, at every moment, the old or the new one. Raises OSError as ``written_at_once``."""
    with written_at_once(path) as stream:
        stream.write(text.encode())


@contextmanager
def written_at_once(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file ``path`` when the block ends, and leaves nothing if it fails.

    The file has the permissions of any new file (one made by ``tempfile`` could be read by its owner alone).

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
