"""Unpacking of archives that come from elsewhere: nothing is written outside of the folder that was asked for.

A data set is files in folders. Whatever else an archive may hold (links, devices, pipes, absolute names, names that
climb with ``..``) is refused rather than repaired, because whoever made it either did not mean a data set or no good.
"""

import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import IO

from utils.errors import UserError
from utils.progress import progress

# Images hardly compress and label text compresses about tenfold, while deflate's best is 1032 to 1: more than this is
# no data set but something that is meant to fill the disk. Small archives may be padding mostly.
LARGEST_RATIO = 200
ALWAYS_ALLOWED = 64_000_000  # bytes
PIECE = 1 << 20
LEFT_OUT = ("__MACOSX", ".DS_Store")  # what macOS adds
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)


@dataclass
class _Member:
    """A file in an archive; ``size`` in bytes is what the archive declares."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: str | Path, folder: str | Path, largest: int | None = None) -> int:
    """Unpacks a zip or tar file (plain, gz, bz2, xz; told by its content) into ``folder``, which is made if need be.

    Where it fails, ``folder`` holds what was written so far: give it one that can be thrown away.

    Args:
        largest: bytes that the files may have together; None is 200 times the archive, at least 64 MB.

    Returns:
        Number of files written.

    Raises:
        UserError: no archive, a broken one, one that is not made of plain files below ``folder``, one larger than it
            may be, or a disk that it does not fit on.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        largest = max(archive.stat().st_size * LARGEST_RATIO, ALWAYS_ALLOWED) if largest is None else largest
        if zipfile.is_zipfile(archive):
            members = _zip_members(archive, folder, largest)
        elif tarfile.is_tarfile(archive):
            members = _tar_members(archive)
        else:
            raise UserError(
                f"{archive}: is neither a zip nor a tar file. Perhaps it is a web page. Remove it and fetch it again."
            )
        return _write(members, archive, folder, largest)
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{archive}: cannot be unpacked, it is broken or of unknown kind ({reason}). Remove it and fetch it again."
        ) from None
    except OSError as error:
        place = error.filename or folder
        raise UserError(f"{place}: cannot be written while {archive} is unpacked ({error.strerror or error})") from None


def safe_parts(name: str, archive: Path) -> tuple[str, ...]:
    """The folders and the file that a member's name stands for; none where it stands for the archive's root.

    Raises:
        UserError: the name is absolute, climbs out of its folder, or means something else on another system.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    windows = PureWindowsPath(name)
    if name.startswith(("/", "\\")) or windows.drive or windows.root or ".." in parts or "\0" in name:
        raise UserError(
            f"{archive}: holds '{name}', which lies outside of the folder it is unpacked to. Do not use it."
        )
    return tuple(parts)


def _zip_members(archive: Path, folder: Path, largest: int) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
        total = sum(info.file_size for info in infos)
        _check_total(total, archive, largest)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise UserError(f"{folder}: {archive.name} unpacks to {total / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")
        for info in infos:
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            if info.is_dir():
                safe_parts(info.filename, archive)
                continue
            if kind not in (0, stat.S_IFREG):
                _refuse_kind(info.filename, archive, stat.S_ISLNK(kind))
            if info.flag_bits & 1:
                raise UserError(f"{archive}: is encrypted. Unpack it by hand.")
            yield _Member(info.filename, info.file_size, lambda info=info: opened.open(info))


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, "r:*") as opened:
        for info in opened:
            if info.isdir():
                safe_parts(info.name, archive)
                continue
            if not info.isreg():
                _refuse_kind(info.name, archive, info.issym() or info.islnk())
            yield _Member(info.name, info.size, lambda info=info: opened.extractfile(info))
        # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros, or the file's.
        opened.fileobj.seek(opened.offset)
        if opened.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged after {opened.offset:,} bytes")


def _refuse_kind(name: str, archive: Path, link: bool) -> None:
    kind = "a link" if link else "a device or pipe"
    raise UserError(f"{archive}: '{name}' is {kind}; only plain files and folders are unpacked. Unpack it by hand.")


def _check_total(total: int, archive: Path, largest: int) -> None:
    if total > largest:
        raise UserError(
            f"{archive}: would unpack to {total / 1e6:,.0f} MB or more, {largest / 1e6:,.0f} MB are allowed for an "
            f"archive of {archive.stat().st_size / 1e6:,.1f} MB. If it is to be trusted, unpack it by hand."
        )


def _write(members: Iterator[_Member], archive: Path, folder: Path, largest: int) -> int:
    count, total = 0, 0
    for member in progress(members, f"Unpacking {archive.name}"):
        parts = safe_parts(member.name, archive)
        if not parts or parts[0] == LEFT_OUT[0] or parts[-1] == LEFT_OUT[1]:
            continue
        total += member.size
        _check_total(total, archive, largest)
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, open(target, "wb") as stream:
            left = member.size
            # Both libraries stop at the declared size; that nothing more is ever written is not left to them.
            while piece := source.read(min(PIECE, left)):
                stream.write(piece)
                left -= len(piece)
        count += 1
    return count
