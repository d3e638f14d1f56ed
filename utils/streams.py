"""Cameras and network streams: each is read by a thread of its own, and only its newest frame is kept.

A detector that is slower than the camera would otherwise fall further and further behind.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np

from utils.errors import UserError
from utils.images import is_image, is_video
from utils.log import LOGGER
from utils.sources import Frame

PROTOCOLS = ("rtsp", "rtmp", "http", "https", "tcp", "udp")
ATTEMPTS = 3  # to open a stream again that has broken off
PAUSE = 1.0  # seconds before each
VIDEO_PAGES = ("youtube.com", "youtu.be")  # of which YOLOv5 finds the stream itself, with a package that is gone


def is_stream(source: str) -> bool:
    """Whether a --source argument is a camera's number, a stream's address or a list of those (.streams).

    The address of an image or video file is none: see ``file_address``.
    """
    text = str(source)
    live = urlsplit(text).scheme.lower() in PROTOCOLS and not file_address(text)
    return text.isdecimal() or text.endswith(".streams") or live


def file_address(source: str) -> bool:
    """Whether a --source argument is the web address of an image or video file."""
    parts = urlsplit(str(source))
    return parts.scheme.lower() in ("http", "https") and (is_image(parts.path) or is_video(parts.path))


def list_streams(source: str) -> list[str]:
    """The addresses that a --source argument stands for.

    Raises:
        UserError: a list that cannot be read or holds something else.
    """
    if not source.endswith(".streams"):
        return [source]
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"--source {source}: cannot be read ({error.strerror or error})") from None
    found = [line for line in lines if line and not line.startswith("#")]
    for line in found:
        if line.endswith(".streams") or not is_stream(line):
            raise UserError(f"--source {source}: '{line}' is no camera number and no stream's address")
    if not found:
        raise UserError(f"--source {source}: no streams in it. Write one camera number or address on each line")
    return found


def stream_name(address: str) -> str:
    """What files of a stream are called: its address without what file systems refuse, passwords left out."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    text = f"camera{address}" if address.isdecimal() else f"{host}{parts.path}"
    return re.sub(r"[^\w-]+", "_", text).strip("_") or "stream"


class Stream:
    """One camera or address, read until it ends.

    Raises:
        UserError: it cannot be opened, or is a page around a video.
    """

    def __init__(self, address: str, stride: int = 1) -> None:
        if (urlsplit(address).hostname or "").endswith(VIDEO_PAGES):
            raise UserError(f"--source {address}: a page, not a stream. Give what 'yt-dlp -g {address}' prints")
        self.address, self.stride, self.name = address, stride, stream_name(address)
        self.capture = self._open()
        if not self.capture.isOpened():
            raise UserError(f"--source {self.name}: cannot be opened. Is the camera connected, does the address exist?")
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else 30.0
        self.newest: tuple[int, np.ndarray] | None = None
        self.ended = False
        self.changed = threading.Condition()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._read, name=self.name, daemon=True)
        self.thread.start()

    def _open(self) -> cv2.VideoCapture:
        return cv2.VideoCapture(int(self.address) if self.address.isdecimal() else self.address)

    def _read(self) -> None:
        """Runs in the thread: keeps the newest frame, and opens the stream again if it breaks off."""
        index = 0
        while not self.stopped.is_set():
            if not self.capture.grab():
                if not self._reopened():
                    break
                continue
            if index % self.stride == 0:
                good, image = self.capture.retrieve()
                if good:
                    with self.changed:
                        self.newest = index, image
                        self.changed.notify_all()
            index += 1
        self.capture.release()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _reopened(self) -> bool:
        for attempt in range(1, ATTEMPTS + 1):
            LOGGER.warning(f"{self.name}: no frames; opening it again ({attempt} of {ATTEMPTS})")
            if self.stopped.wait(PAUSE):
                return False
            self.capture.release()
            self.capture = self._open()
            if self.capture.isOpened() and self.capture.grab():
                return True
        LOGGER.warning(f"{self.name}: has ended")
        return False

    def wait(self, timeout: float) -> Frame | None:
        """The newest frame that was not handed out yet; None if none comes in so many seconds, or ever."""
        with self.changed:
            self.changed.wait_for(lambda: self.newest is not None or self.ended, timeout)
            if self.newest is None:
                return None
            (index, image), self.newest = self.newest, None
        return Frame(Path(self.name), image, index, 0, self.fps, is_live=True)

    @property
    def finished(self) -> bool:
        """Whether it has ended and its last frame is handed out."""
        with self.changed:
            return self.ended and self.newest is None

    def close(self) -> None:
        """Stops reading."""
        self.stopped.set()
        self.thread.join(timeout=5)


class Streams:
    """Iterates over the newest frames of cameras and network streams, in turn, until all of them have ended."""

    def __init__(self, source: str, stride: int = 1) -> None:
        if stride < 1:
            raise UserError(f"--vid-stride {stride}: must be 1 or more.")
        self.streams: list[Stream] = []
        try:
            for address in list_streams(source):
                self.streams.append(Stream(address, stride))
        except UserError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.streams)

    def __iter__(self) -> Iterator[Frame]:
        try:
            while left := [stream for stream in self.streams if not stream.finished]:
                yield from _newest(left)
        finally:
            self.close()

    def close(self) -> None:
        """Stops all threads."""
        for stream in self.streams:
            stream.close()


def _newest(streams: Sequence[Stream]) -> Iterator[Frame]:
    for stream in streams:
        frame = stream.wait(timeout=1.0 / len(streams))
        if frame is not None:
            yield frame
