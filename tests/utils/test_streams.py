"""Streams over HTTP on the loopback interface, as cameras send them: one JPEG after the other."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

import utils.streams
from utils.errors import UserError
from utils.streams import Streams, file_address, is_stream, list_streams, stream_name

FRAMES = 12


class _Camera(BaseHTTPRequestHandler):
    """Sends frames of growing brightness, for as many requests as the server has films left."""

    def log_message(self, *_arguments) -> None:
        pass

    def do_GET(self) -> None:
        if not self.server.films:
            self.send_error(404)
            return
        self.server.films.pop()
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with contextlib.suppress(OSError):
            for number in range(FRAMES):
                encoded = cv2.imencode(".jpg", np.full((48, 64, 3), 20 * number, np.uint8))[1].tobytes()
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(encoded))
                self.wfile.write(encoded + b"\r\n")
                time.sleep(0.01)


@pytest.fixture
def camera(monkeypatch):
    """The address of a camera; ``films`` says how often it can be opened."""
    monkeypatch.setattr(utils.streams, "PAUSE", 0.05)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Camera)
    server.daemon_threads, server.films = True, [None]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_port}/live.mjpg"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_newest_frames_come_in_order_and_the_last_one_comes(camera, capsys):
    frames = list(Streams(camera.address))
    levels = [round(float(frame.image.mean()) / 20) for frame in frames]
    assert levels == sorted(set(levels)) and levels[-1] >= FRAMES - 2 and frames[0].image.shape == (48, 64, 3)
    assert all(frame.is_live and frame.is_video and frame.fps > 0 and frame.kind == "stream" for frame in frames)
    assert frames[0].path.name == stream_name(camera.address)
    assert "opening it again (3 of 3)" in capsys.readouterr().out


def test_a_stream_that_breaks_off_is_opened_again(camera):
    camera.films *= 2
    levels = [round(float(frame.image.mean()) / 20) for frame in Streams(camera.address)]
    assert not camera.films and sorted(levels) != levels


def test_several_streams_and_a_stride(camera, tmp_path):
    camera.films *= 2
    file = tmp_path / "all.streams"
    file.write_text(f"# two views\n{camera.address}?a\n\n{camera.address}?b\n")
    streams = Streams(str(file), stride=5)
    assert len(streams) == 2
    seen = [(frame.path.name, frame.index) for frame in streams]
    assert all(index % 5 == 0 for _, index in seen) and seen


def test_what_cannot_be_opened_is_refused(camera, tmp_path):
    camera.films.clear()
    with pytest.raises(UserError, match="cannot be opened"):
        Streams(camera.address)
    with pytest.raises(UserError, match=r"a page, not a stream.*yt-dlp -g"):
        Streams("https://www.youtube.com/watch?v=x")
    with pytest.raises(UserError, match="must be 1 or more"):
        Streams(camera.address, 0)
    for text, message in (("", "no streams in it"), ("picture.jpg\n", "'picture.jpg' is no camera number")):
        (tmp_path / "x.streams").write_text(text)
        with pytest.raises(UserError, match=message):
            list_streams(str(tmp_path / "x.streams"))
    with pytest.raises(UserError, match="cannot be read"):
        list_streams(str(tmp_path / "none.streams"))


@pytest.mark.parametrize(
    "source, live, a_file",
    [
        ("0", True, False),
        ("rtsp://user:secret@10.0.0.1/stream", True, False),
        ("rtsp://10.0.0.1/film.mp4", True, False),
        ("http://10.0.0.1:8080/video", True, False),
        ("https://example.com/bus.jpg?size=1", False, True),
        ("https://example.com/film.MP4", False, True),
        ("list.streams", True, False),
        ("folder/bus.jpg", False, False),
        ("C:/folder", False, False),
    ],
)
def test_what_is_a_stream(source, live, a_file):
    assert is_stream(source) == live and file_address(source) == a_file


def test_names_hold_no_passwords():
    assert stream_name("rtsp://user:secret@10.0.0.1:554/cam/1?x=2") == "10_0_0_1_554_cam_1"
    assert stream_name("2") == "camera2"
