import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from loopback import loopback

from utils import downloads, progress
from utils.downloads import Patience, download, file_name, find_weights, mirrored
from utils.errors import UserError
from utils.paths import ROOT

CONTENT = bytes(range(256)) * 4000
QUICK = Patience(attempts=3, wait=0.01, timeout=5)


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", downloads.MIRROR_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    with loopback() as site:
        site.files["/a/file.bin"] = CONTENT
        yield site


def fetch(site, tmp_path, checksum="", path="/a/file.bin"):
    return download(site.url + path, tmp_path / "new" / "file.bin", checksum, QUICK)


def leftovers(tmp_path):
    return sorted(item.name for item in (tmp_path / "new").iterdir())


def begun(site, tmp_path, size):
    """Leaves the part of a download that broke off after ``size`` bytes, three times at the same place."""
    site.break_after = [size, 0, 0]
    with pytest.raises(UserError, match="ended after"):
        fetch(site, tmp_path)
    site.requests.clear()
    assert (tmp_path / "new" / "file.bin.part").read_bytes() == CONTENT[:size]


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256"])
def test_a_file_is_fetched_once_and_checked(site, tmp_path, algorithm):
    checksum = f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()}"
    assert fetch(site, tmp_path, checksum).read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["file.bin"]
    assert fetch(site, tmp_path, checksum.upper()).read_bytes() == CONTENT
    assert site.requests == [("/a/file.bin", "")]


def test_an_interrupted_download_resumes(site, tmp_path):
    begun(site, tmp_path, 300_000)
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == [("/a/file.bin", "bytes=300000-")]
    assert leftovers(tmp_path) == ["file.bin"]


def test_a_terminal_shows_how_much_has_arrived(site, tmp_path, monkeypatch):
    """From where an earlier attempt stopped; the bar itself is tested in test_progress.py."""
    begun(site, tmp_path, 256_000)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.delenv("RANK", raising=False)
    fetch(site, tmp_path)
    assert re.search(r"file.bin:  25%.*256kB/1.02MB", terminal.getvalue())


def test_a_file_that_has_moved_is_followed_and_resumes(site, tmp_path):
    """Releases on GitHub are redirected to a storage of their own."""
    site.moved["/a/file.bin"] = "/storage/1234"
    site.files["/storage/1234"] = CONTENT
    begun(site, tmp_path, 1000)
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == [("/a/file.bin", "bytes=1000-"), ("/storage/1234", "bytes=1000-")]


def test_a_connection_that_breaks_again_and_again_is_continued_as_long_as_bytes_come(site, tmp_path):
    site.break_after = [150_000] * 6
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    assert [span for _, span in site.requests] == ["", *(f"bytes={150_000 * n}-" for n in range(1, 7))]


def test_a_killed_process_leaves_what_the_next_one_continues(site, tmp_path):
    site.files["/a/file.bin"] = CONTENT * 20
    site.break_after = [2_000_000]
    code = "import sys; from utils.downloads import download; download(sys.argv[1], sys.argv[2])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"{site.url}/a/file.bin", str(tmp_path / "new" / "file.bin")],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    part = tmp_path / "new" / "file.bin.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 2_000_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # while it waits a second for its next attempt
    process.communicate()
    site.requests.clear()
    assert fetch(site, tmp_path).read_bytes() == CONTENT * 20
    assert site.requests == [("/a/file.bin", "bytes=2000000-")]


def test_a_file_that_changed_meanwhile_is_fetched_anew(site, tmp_path):
    begun(site, tmp_path, 1000)
    site.files["/a/file.bin"] = changed = CONTENT[::-1]
    assert fetch(site, tmp_path).read_bytes() == changed
    assert site.requests == [("/a/file.bin", "bytes=1000-")]


def test_a_server_that_continues_another_file_is_not_believed(site, tmp_path):
    begun(site, tmp_path, 1000)
    site.careless = True
    site.files["/a/file.bin"] = changed = CONTENT[::-1]
    assert fetch(site, tmp_path).read_bytes() == changed
    assert [span for _, span in site.requests] == ["bytes=1000-", ""]


def test_a_file_that_became_shorter_than_its_part_is_fetched_anew(site, tmp_path):
    begun(site, tmp_path, 1000)
    site.careless = True
    site.files["/a/file.bin"] = b"short"
    assert fetch(site, tmp_path).read_bytes() == b"short"


@pytest.mark.parametrize("missing", ["ranges", "tags", "lengths"])
def test_servers_that_cannot_continue_start_anew(site, tmp_path, missing):
    setattr(site, missing, False)
    site.break_after = [1000] if missing != "lengths" else []
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    # Without a tag nothing is asked to be continued: the file could be another one by now.
    spans = {"ranges": ["", "bytes=1000-"], "tags": ["", ""], "lengths": [""]}
    assert [span for _, span in site.requests] == spans[missing]


def test_a_complete_part_needs_no_request(site, tmp_path):
    begun(site, tmp_path, 1000)
    (tmp_path / "new" / "file.bin.part").write_bytes(CONTENT)
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == []


@pytest.mark.parametrize("state", ["", "[]", '{"url": "x"}', '{"url": 1, "size": "9", "validator": []}'])
def test_a_damaged_state_file_starts_anew(site, tmp_path, state):
    begun(site, tmp_path, 1000)
    (tmp_path / "new" / "file.bin.part.json").write_text(state)
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == [("/a/file.bin", "")]


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(site, tmp_path):
    with pytest.raises(UserError, match=f"has md5 {hashlib.md5(CONTENT).hexdigest()} instead of {'0' * 32}"):
        fetch(site, tmp_path, "md5:" + "0" * 32)
    assert not [name for name in leftovers(tmp_path) if not name.endswith(".lock")]
    (tmp_path / "new" / "file.bin").write_text("mine")
    with pytest.raises(UserError, match="Move it away"):
        fetch(site, tmp_path, "md5:" + "0" * 32)
    assert (tmp_path / "new" / "file.bin").read_text() == "mine"


@pytest.mark.parametrize("checksum", ["md5:12", "crc32:00000000", "nonsense", "sha256:" + "g" * 64])
def test_what_is_no_checksum_is_refused(site, tmp_path, checksum):
    with pytest.raises(UserError, match="no checksum"):
        fetch(site, tmp_path, checksum)


def test_answers_that_pass_are_waited_for_and_others_are_not(site, tmp_path):
    site.statuses = [503, 429]
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    site.statuses = [503] * 9
    with pytest.raises(UserError, match="503 Service Unavailable"):
        download(f"{site.url}/a/file.bin", tmp_path / "other", patience=QUICK)
    site.statuses, site.requests = [], []
    with pytest.raises(UserError, match=r"404 Not Found.*YOLOV5_QAT_MIRROR"):
        fetch(site, tmp_path / "third", path="/nowhere.bin")
    assert len(site.requests) == 1


def test_no_server_is_a_message(tmp_path):
    with pytest.raises(UserError, match="cannot be reached"):
        download("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", patience=QUICK)


def test_offline_is_a_message(site, tmp_path, monkeypatch):
    monkeypatch.setenv(downloads.OFFLINE_VARIABLE, "1")
    with pytest.raises(UserError, match="forbids downloads"):
        fetch(site, tmp_path)
    assert site.requests == []


def test_a_full_disk_is_a_message_and_the_part_stays(site, tmp_path, monkeypatch):
    """/dev/full has no room for a single byte."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device.*MB are free there.*run the same command again"):
        fetch(site, tmp_path)
    assert not (tmp_path / "new" / "file.bin").exists()
    (tmp_path / "new" / "file.bin.part").unlink()
    assert fetch(site, tmp_path).read_bytes() == CONTENT


def test_a_file_larger_than_the_disk_is_not_begun(site, tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    huge = downloads._Whole("x", free.f_bavail * free.f_frsize * 2, "")
    with pytest.raises(UserError, match=r"MB are still to come but .* MB are free"):
        downloads._check_space(huge, 0, tmp_path / "x.part")


def test_two_that_want_the_same_file_fetch_it_once(site, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(site, tmp_path).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4 and len(site.requests) == 1


def test_addresses():
    assert file_name("https://a.org/b/c%20d.zip?x=1") == "c d.zip"
    for url in ("ftp://a.org/b", "file:///etc/passwd", "https://a.org/", "b.zip", "https:///b", "https://a.org/%2e%2e"):
        with pytest.raises(UserError):
            file_name(url)


def test_a_mirror_is_asked_instead(site, tmp_path, monkeypatch):
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, site.url + "/")
    site.add("https://example.org/deep/file.bin", b"copy")
    assert mirrored("https://example.org/deep/file.bin") == f"{site.url}/example.org/deep/file.bin"
    assert download("https://example.org/deep/file.bin", tmp_path / "f").read_bytes() == b"copy"


def test_weights_by_name(site, tmp_path, monkeypatch):
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, site.url)
    monkeypatch.chdir(tmp_path)
    site.add(downloads.WEIGHTS_URL + "yolov5s.pt", b"weights")
    assert find_weights("yolov5s.pt").read_bytes() == b"weights" and (tmp_path / "yolov5s.pt").is_file()
    site.requests.clear()
    assert str(find_weights("mine.pt")) == "mine.pt" and site.requests == []
    (tmp_path / "yolov5n.pt").write_text("mine")  # whatever lies there is used
    assert find_weights("yolov5n.pt").read_text() == "mine" and site.requests == []
    with pytest.raises(UserError, match=r"yolov5m.pt: no such file, .*404.*put it at"):
        find_weights("yolov5m.pt")
    site.add(downloads.WEIGHTS_URL + "yolov5n.pt", b"not the official ones")
    with pytest.raises(UserError, match="sha256"):
        find_weights("folder/yolov5n.pt")


def test_state_is_plain_text(site, tmp_path):
    begun(site, tmp_path, 1000)
    state = json.loads((tmp_path / "new" / "file.bin.part.json").read_text())
    assert state["size"] == len(CONTENT) and re.fullmatch('"[0-9a-f]{32}"', state["validator"])


def test_a_name_that_nobody_knows_is_tried_twice(tmp_path, capsys):
    with pytest.raises(UserError, match="cannot be reached"):
        download(
            "http://nowhere.invalid/file.bin", tmp_path / "file.bin", "", Patience(attempts=5, wait=0.01, timeout=5)
        )
    assert capsys.readouterr().out.count("another attempt") == 1
