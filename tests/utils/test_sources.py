import cv2
import numpy as np
import pytest

from utils.errors import UserError
from utils.images import write_image
from utils.sources import Sources, list_sources


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["b.png", "a.jpg", "deep/c.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name, np.full((20, 30, 3), 40 * number, np.uint8))
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


@pytest.fixture
def video(tmp_path):
    """Ten frames of growing brightness at 12 per second."""
    file = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    assert writer.isOpened()
    for number in range(10):
        writer.write(np.full((48, 64, 3), 20 * number, np.uint8))
    writer.release()
    return file


def names(source):
    return [file.name for file in list_sources(source)]


def test_files_folders_patterns_and_lists(folder, monkeypatch):
    assert names(folder / "b.png") == ["b.png"]
    assert names(folder) == ["a.jpg", "b.png"]
    assert names(folder / "*.png") == ["b.png"]
    assert names(folder / "**" / "*.png") == ["b.png", "c.png"]
    (folder / "list.txt").write_text("deep/c.png\n\n./a.jpg\n")
    assert names(folder / "list.txt") == ["c.png", "a.jpg"]
    monkeypatch.chdir(folder)
    assert names("*.*") == ["a.jpg", "b.png"]


def test_a_name_with_brackets_is_a_file_first(folder):
    write_image(folder / "x[1].png", np.zeros((10, 10, 3), np.uint8))
    assert names(folder / "x[1].png") == ["x[1].png"]


@pytest.mark.parametrize("source", ["missing.png", "missing", "0", "rtsp://host/stream", "https://host/a.jpg"])
def test_what_cannot_be_read_is_refused_by_name(source):
    with pytest.raises(UserError, match=source):
        list_sources(source)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="no images or videos"):
        list_sources(tmp_path)


def test_images_come_as_frames(folder):
    frames = list(Sources(folder))
    assert [frame.path.name for frame in frames] == ["a.jpg", "b.png"]
    assert frames[1].image.shape == (20, 30, 3)
    assert (frames[1].image == 0).all()
    assert not frames[1].is_video
    assert (frames[1].index, frames[1].count, frames[1].fps) == (0, 1, 0.0)


@pytest.mark.parametrize("stride", [1, 3])
def test_videos_come_frame_by_frame(video, stride):
    frames = list(Sources(video, stride))
    assert [frame.index for frame in frames] == list(range(0, 10, stride))
    for frame in frames:
        assert frame.is_video
        assert (frame.count, frame.fps) == (10, 12.0)
        assert frame.image.mean() == pytest.approx(20 * frame.index, abs=3)


def test_a_broken_file_is_named_and_left_out(folder, video, capsys):
    (folder / "a.jpg").write_bytes(b"broken")
    (folder / "broken.avi").write_bytes(b"broken")
    frames = list(Sources(folder))
    assert len(frames) == 11
    text = capsys.readouterr().out
    assert "a.jpg" in text
    assert "broken.avi" in text
    with pytest.raises(UserError, match="None of 1 files"):
        list(Sources(folder / "a.jpg"))
    with pytest.raises(UserError, match="--vid-stride 0"):
        Sources(folder, 0)
