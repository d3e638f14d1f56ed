"""Where things are: the project's root folder and numbered run folders."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
