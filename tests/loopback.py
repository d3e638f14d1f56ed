"""A server on the loopback interface that holds files and can be told to behave like the bad ones of the world."""

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback:
    """Files by path, and how they are served. ``requests`` lists (path, Range header or '') as they came."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.break_after: list[int] = []  # bytes after which the connection is cut, one entry per answer
        self.statuses: list[int] = []  # answers that come before anything else
        self.moved: dict[str, str] = {}  # path -> where the file is instead
        self.ranges = True  # understands Range
        self.careless = False  # continues a file whatever If-Range says
        self.tags = True  # sends ETags
        self.lengths = True  # says how long a file is
        self.url = ""

    def add(self, url: str, content: bytes) -> None:
        """Offers a copy of what https://host/path holds."""
        self.files["/" + url.split("://", 1)[1]] = content


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments) -> None:
        pass

    def do_GET(self) -> None:
        site: Loopback = self.server.site
        site.requests.append((self.path, self.headers.get("Range", "")))
        if self.path in site.moved:
            self.send_response(302)
            self.send_header("Location", site.moved[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = site.statuses.pop(0) if site.statuses else 200
        content = site.files.get(self.path)
        if content is None or status != 200:
            self.send_error(404 if content is None else status)
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = self._start(site, content, tag)
        if start > len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if site.tags:
            self.send_header("ETag", tag)
        if site.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        body = content[start:]
        with contextlib.suppress(OSError):
            if site.break_after:
                self.wfile.write(body[: site.break_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
            else:
                self.wfile.write(body)

    def _start(self, site: Loopback, content: bytes, tag: str) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = site.careless or self.headers.get("If-Range", tag) == tag
        return int(asked[1]) if asked and site.ranges and unchanged else 0


@contextlib.contextmanager
def loopback() -> Iterator[Loopback]:
    """A running server; it stops at the end of the block."""
    site = Loopback()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.site, server.daemon_threads = site, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
