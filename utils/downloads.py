"""Downloads over HTTP: they resume, are checked, and a file has its name only once it is complete.

While a file is on its way it is called NAME.part; NAME.part.json beside it says what the server told of the whole when
it was begun. A part is continued only if the server says that the whole is still the same (RFC 9110, If-Range).
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from utils.errors import UserError
from utils.log import LOGGER
from utils.progress import progress

# A server that holds copies: https://host/path/file is fetched from $YOLOV5_QAT_MIRROR/host/path/file instead, the
# layout that `wget --force-directories URL` makes.
MIRROR_VARIABLE = "YOLOV5_QAT_MIRROR"
OFFLINE_VARIABLE = "YOLOV5_QAT_OFFLINE"  # 1: nothing is ever fetched

WEIGHTS_URL = "https://github.com/ultralytics/yolov5/releases/download/v7.0/"
WEIGHTS = frozenset(f"yolov5{size}{levels}.pt" for size in "nsmlx" for levels in ("", "6"))
WEIGHTS_CHECKSUMS = {"yolov5n.pt": "sha256:4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3"}

DIGEST_LENGTHS = {"md5": 32, "sha1": 40, "sha256": 64}  # hexadecimal digits
PIECE = 1 << 18  # bytes read at a time
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that another attempt may change


@dataclass(frozen=True)
class Patience:
    """How long a download is tried."""

    attempts: int = 5  # in a row that bring not one byte
    wait: float = 1.0  # seconds before the second attempt, doubled for each further one
    timeout: float = 30.0  # seconds without a byte after which an attempt has failed


PATIENCE = Patience()


class _InterruptedError(Exception):
    """An attempt failed in a way that another one may not."""

    unknown_name = False  # whether the server's name has no address


class _RestartError(_InterruptedError):
    """What has arrived cannot be continued."""


@dataclass
class _Whole:
    """What the server says of the complete file; ``size`` in bytes is None where it does not say."""

    url: str
    size: int | None
    validator: str  # a strong ETag or a date of last modification, '' where there is neither

    @classmethod
    def of(cls, url: str, headers: http.client.HTTPMessage, size: int | None) -> "_Whole":
        tag = headers.get("ETag", "").strip()
        # A weak tag names equal contents, not equal bytes: nothing to continue a file by.
        return cls(url, size, tag if tag.startswith('"') else headers.get("Last-Modified", "").strip())


def file_name(url: str) -> str:
    """The last part of a URL's path, as a file name.

    Raises:
        UserError: not an http or https address, or one without a file name.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # half of an IPv6 address, say
        usable = False
    if not usable:
        raise UserError(f"{url}: is not an http:// or https:// address")
    name = unquote(parts.path).rsplit("/", 1)[-1]
    if name in ("", ".", "..") or re.search(r'[\\:*?"<>|\x00-\x1f]', name):
        raise UserError(f"{url}: does not end in a file name")
    return name


def mirrored(url: str) -> str:
    """The address that is asked for ``url``: itself, or its copy on the server that $YOLOV5_QAT_MIRROR names."""
    file_name(url)
    mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    parts = urlsplit(url)
    if not mirror:
        return quote(url, safe="/:?#[]@!$&'()*+,;=%~")
    query = f"?{parts.query}" if parts.query else ""
    return f"{mirror}/{parts.netloc}{quote(parts.path, safe='/%')}{query}"


def parse_checksum(text: str, where: str) -> tuple[str, str]:
    """``algorithm:digits`` as (algorithm, lower-case digits).

    Raises:
        UserError: ``where`` gives an unknown algorithm or a wrong number of digits.
    """
    algorithm, _, digits = text.strip().lower().partition(":")
    if algorithm not in DIGEST_LENGTHS or not re.fullmatch(rf"[0-9a-f]{{{DIGEST_LENGTHS[algorithm]}}}", digits):
        lengths = ", ".join(f"{name} ({length} digits)" for name, length in DIGEST_LENGTHS.items())
        raise UserError(f"{where}: '{text}' is no checksum. Known are {lengths}.")
    return algorithm, digits


def digest(file: Path, algorithm: str) -> str:
    """Hexadecimal checksum of a file."""
    total = hashlib.new(algorithm, usedforsecurity=False)
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def download(url: str, destination: str | Path, checksum: str = "", patience: Patience = PATIENCE) -> Path:
    """Fetches ``url`` into the file ``destination`` unless it is there; continues where an earlier call stopped.

    Args:
        checksum: ``md5:...``, ``sha1:...`` or ``sha256:...``, or '' where none is known.

    Raises:
        UserError: wrong address, server not reached, file not there, disk full, checksum wrong.
    """
    destination = Path(destination)
    expected = parse_checksum(checksum, url) if checksum else None
    address = mirrored(url)
    part = destination.with_name(destination.name + ".part")
    lock = destination.with_name(destination.name + ".lock")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # of two processes that want the file one fetches it
            if not destination.exists():
                if os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0"):
                    raise UserError(
                        f"{url} is needed, but ${OFFLINE_VARIABLE} forbids downloads. Put it at {destination}"
                    )
                LOGGER.info(f"Downloading {address} to {destination}")
                _fetch(address, part, patience)
                _check(part, expected, f"{address}: the downloaded file")
                os.replace(part, destination)
                _state_file(part).unlink(missing_ok=True)
            else:
                _check(destination, expected, str(destination))
        lock.unlink(missing_ok=True)
    except OSError as error:
        raise _disk_error(error, part) from None
    return destination


def _check(file: Path, expected: tuple[str, str] | None, subject: str) -> None:
    if expected is None or (found := digest(file, expected[0])) == expected[1]:
        return
    if file.suffix == ".part":  # to continue it would only repeat the mistake
        file.unlink()
        _state_file(file).unlink(missing_ok=True)
        remedy = "It was removed. Try again; if it stays so, the server offers another file than the one declared."
    else:
        remedy = "Move it away, and it is fetched again."
    raise UserError(f"{subject} has {expected[0]} {found} instead of {expected[1]}. {remedy}")


def _disk_error(error: OSError, part: Path) -> UserError:
    free = ""
    with contextlib.suppress(OSError):
        free = f" {shutil.disk_usage(part.parent).free / 1e6:,.0f} MB are free there."
    return UserError(
        f"{error.filename or part}: cannot be written ({error.strerror or error}).{free} What has arrived is kept: "
        "make room or correct the permissions, then run the same command again."
    )


# --- attempts
def _fetch(address: str, part: Path, patience: Patience) -> None:
    """Completes ``part``, over several attempts if need be."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _attempt(address, part, patience.timeout)
        except _InterruptedError as error:
            failures = 1 if _size(part) > before else failures + 1
            # A name that nobody knows is mostly a machine without a network; one more attempt tells.
            if failures >= (min(patience.attempts, 2) if error.unknown_name else patience.attempts):
                kept = f" {_size(part) / 1e6:,.1f} MB have arrived and are kept." if _size(part) else ""
                raise UserError(
                    f"{address}: {error}.{kept} Check the connection and run the same command again, or fetch the "
                    f"file by other means and name a server that has it in ${MIRROR_VARIABLE}."
                ) from None
            wait = patience.wait * 2 ** (failures - 1)
            LOGGER.warning(f"{address}: {error}; another attempt in {wait:g} s")
            time.sleep(wait)


def _attempt(address: str, part: Path, timeout: float) -> None:
    """One request; what arrives is appended to ``part``, or replaces it where the server starts anew."""
    known, have = _load_state(part, address)
    if known is not None and known.size == have:
        return
    headers = {"User-Agent": "yolov5-qat", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known.validator}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=timeout) as answer:
            whole, start = _understand(answer, address, known, have)
            if start:
                LOGGER.info(f"Continuing at {start / 1e6:,.1f} MB")
            _check_space(whole, start, part)
            _save_state(part, whole)
            _receive(answer, part, start, whole.size)
    except _RestartError:
        part.unlink()
        raise
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file has become
            part.unlink()
            raise _InterruptedError("the file has changed on the server") from None
        if error.code in PASSING_STATUS:
            raise _InterruptedError(f"the server answered {error.code} {error.reason}") from None
        raise UserError(
            f"{address}: the server answered {error.code} {error.reason}. If the file has moved, fetch it by other "
            f"means, or name a server that has it in ${MIRROR_VARIABLE}."
        ) from None
    except urllib.error.URLError as error:
        interrupted = _InterruptedError(f"the server cannot be reached ({error.reason})")
        interrupted.unknown_name = isinstance(error.reason, socket.gaierror)
        raise interrupted from None
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _InterruptedError(f"the connection broke ({error or type(error).__name__})") from None


def _understand(answer: http.client.HTTPResponse, address: str, known: _Whole | None, have: int) -> tuple[_Whole, int]:
    """What the server says of the whole file, and the byte that its answer begins with."""
    if answer.status != 206:
        length = answer.headers.get("Content-Length", "")
        return _Whole.of(address, answer.headers, int(length) if length.isdecimal() else None), 0
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "").strip())
    whole = _Whole.of(address, answer.headers, int(span[3]) if span else None)
    if span is None or int(span[1]) != have or whole != known:
        # Told to continue only what is unchanged, it continued something else: it is asked for all of it.
        raise _RestartError("the server does not continue the file that was begun")
    return whole, have


def _check_space(whole: _Whole, start: int, part: Path) -> None:
    if whole.size is None:
        return
    missing, free = whole.size - start, shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(
            f"{part.parent}: {missing / 1e6:,.0f} MB are still to come but {free / 1e6:,.0f} MB are free. "
            "Make room there, then run the same command again."
        )


def _receive(answer: http.client.HTTPResponse, part: Path, start: int, size: int | None) -> None:
    name = part.stem
    shown = progress(label=name, total=size, initial=start, unit="B")
    # Buffering is off so that a part that is left behind by a kill holds all that has arrived.
    with shown as bar, open(part, "ab" if start else "wb", buffering=0) as stream:
        while piece := _read(answer):
            rest = memoryview(piece)
            while rest:  # an unbuffered file may take only a share, such as what still fits the disk
                rest = rest[stream.write(rest) :]
            bar.update(len(piece))
        os.fsync(stream.fileno())
    if size is not None and _size(part) < size:
        raise _InterruptedError(f"the connection ended after {_size(part):,} of {size:,} bytes")


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(PIECE)
    except OSError as error:  # told apart from one that the disk raises
        raise _InterruptedError(f"the connection broke ({error})") from None


# --- the part and what is known of it
def _state_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _save_state(part: Path, whole: _Whole) -> None:
    _state_file(part).write_text(json.dumps(asdict(whole)), encoding="utf-8")


def _load_state(part: Path, address: str) -> tuple[_Whole | None, int]:
    """What is known of the whole and how many bytes of it are there; (None, 0) where nothing can be continued."""
    try:
        content = json.loads(_state_file(part).read_text(encoding="utf-8"))
        known = _Whole(str(content["url"]), content["size"], str(content["validator"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0
    have = _size(part)
    usable = known.url == address and known.validator and isinstance(known.size, int) and 0 < have <= known.size
    return (known, have) if usable else (None, 0)


# --- weights by name
def find_weights(path: str | Path) -> Path:
    """A weights file that is there; one of upstream's released names (``yolov5n.pt`` ... ``yolov5x6.pt``) is fetched.

    Files of other names are not looked for anywhere: the path is returned as it is and whoever opens it complains.

    Raises:
        UserError: an official file is missing and cannot be fetched.
    """
    path = Path(path)
    if path.exists() or path.name not in WEIGHTS:
        return path
    try:
        return download(WEIGHTS_URL + path.name, path, WEIGHTS_CHECKSUMS.get(path.name, ""))
    except UserError as error:
        raise UserError(
            f"{path}: no such file, and it cannot be fetched from YOLOv5's releases. {error} A file that you have is "
            f"used as it is: put it at {path.absolute()}"
        ) from None
