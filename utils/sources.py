"""What detection runs on: image and video files named by path, folder, pattern or list, as one stream of frames."""

import glob
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image, is_video, read_image
from utils.log import LOGGER


@dataclass
class Frame:
    """One image to run on.

    Attributes:
        path: the file.
        image: BGR uint8 (height, width, 3).
        index: the number of a video's frame from 0; 0 for an image.
        count: how many frames the video says it has (0 if it does not say); 1 for an image.
        fps: a video's frames per second, 0.0 for an image.
        is_live: it comes from a camera or a stream, whose name ``path`` is.
    """

    path: Path
    image: np.ndarray
    index: int = 0
    count: int = 1
    fps: float = 0.0
    is_live: bool = False

    @property
    def is_video(self) -> bool:
        return self.fps > 0

    @property
    def kind(self) -> str:
        """How messages call it."""
        return "stream" if self.is_live else "video" if self.is_video else "image"


def list_sources(source: str | Path) -> list[Path]:
    """The image and video files that a --source argument stands for, in the order they are run.

    A file, a folder (not its subfolders), a pattern with ``*``, ``?`` or ``[]`` (``**`` goes into subfolders), or a
    .txt list with one of those on each line, relative to the working directory or to the list.

    Raises:
        UserError: nothing there, nothing that can be read, or a stream or web address.
    """
    text = str(source)
    if "://" in text or text.isdigit():
        raise UserError(f"--source {text}: is no file, folder or pattern")
    path = Path(text).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        files = [
            file for line in path.read_text("utf-8-sig").splitlines() if line.strip() for file in _listed(line, path)
        ]
    else:
        files = _expand(path)
    usable = [file for file in files if is_image(file) or is_video(file)]
    if not usable:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise UserError(f"--source {text}: no images or videos in it. Files with these suffixes are read: {suffixes}")
    return usable


def _listed(line: str, list_file: Path) -> list[Path]:
    line = line.strip()
    beside = list_file.parent / line
    return _expand(beside if line.startswith("./") or (not Path(line).exists() and beside.exists()) else Path(line))


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if path.is_file():
        return [path]
    if glob.has_magic(str(path)):
        return sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
    raise UserError(f"--source {path}: no such file or folder.")


class Sources:
    """Iterates over the frames of all files of a source.

    A file that cannot be read is named in a warning and left out; if that happens to all of them, the iteration ends in
    a UserError.

    Args:
        source: see ``list_sources``.
        video_stride: take every so many frames of a video.
    """

    def __init__(self, source: str | Path, video_stride: int = 1) -> None:
        if video_stride < 1:
            raise UserError(f"--vid-stride {video_stride}: must be 1 or more.")
        self.files = list_sources(source)
        self.video_stride = video_stride

    def __len__(self) -> int:
        """How many files there are; a video counts as one."""
        return len(self.files)

    def __iter__(self) -> Iterator[Frame]:
        anything = False
        for file in self.files:
            # .gif is a video here: OpenCV's image reader would see its first frame only.
            frames = self._video(file) if is_video(file) else self._image(file)
            for frame in frames:
                anything = True
                yield frame
        if not anything:
            raise UserError(f"None of {len(self.files)} files could be read; the reasons are above.")

    def _image(self, file: Path) -> Iterator[Frame]:
        try:
            image = read_image(file)
        except UserError as error:
            LOGGER.warning(f"left out: {error}")
            return
        yield Frame(file, image)

    def _video(self, file: Path) -> Iterator[Frame]:
        capture = cv2.VideoCapture(str(file))
        try:
            fps = capture.get(cv2.CAP_PROP_FPS)
            fps = fps if math.isfinite(fps) and fps > 0 else 30.0  # a rate to write the result with
            count = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
            index = 0
            while capture.grab():
                if index % self.video_stride == 0:
                    good, image = capture.retrieve()
                    if not good:
                        break
                    yield Frame(file, image, index, count, fps)
                index += 1
            if index == 0:
                LOGGER.warning(f"left out: {file}: no frame of it can be decoded")
        finally:
            capture.release()
