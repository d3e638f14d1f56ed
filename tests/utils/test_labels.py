import os
import shutil

import numpy as np
import pytest

from utils import labels as subject
from utils.errors import UserError
from utils.images import write_image


@pytest.fixture
def folder(tmp_path):
    """Three images with labels: boxes, a polygon, nothing."""
    images, labels = tmp_path / "images" / "train", tmp_path / "labels" / "train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for name in "abc":
        write_image(images / f"{name}.png", np.zeros((20, 30, 3), np.uint8))
    (labels / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n2 0.25 0.25 0.5 0.5\n")
    (labels / "b.txt").write_text("1 0.1 0.2 0.5 0.2 0.3 0.8\n")
    return tmp_path


def read(folder):
    return subject.read_labelled_images(folder / "images" / "train", "train")


def test_rows_and_polygons():
    rows, problems = subject.parse_labels("0 0.5 0.5 0.2 0.2\n\n1 0.1 0.2 0.5 0.2 0.3 0.8\n3.0 1e-1 .1 0.1 0.1\n")
    np.testing.assert_allclose(
        rows, [[0, 0.5, 0.5, 0.2, 0.2], [1, 0.3, 0.5, 0.4, 0.6], [3, 0.1, 0.1, 0.1, 0.1]], atol=1e-6
    )
    assert rows.dtype == np.float32
    assert problems == []
    assert subject.parse_labels("")[0].shape == (0, 5)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("0 0.5 0.5 0.2", "4 fields"),
        ("0 0.5 0.5 0.2 0.2 0.9", "6 fields"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 fields"),
        ("cat 0.5 0.5 0.2 0.2", "numbers"),
        ("0 0,5 0.5 0.2 0.2", "numbers"),
        ("-1 0.5 0.5 0.2 0.2", "class -1"),
        ("1.5 0.5 0.5 0.2 0.2", "class 1.5"),
        ("nan 0.5 0.5 0.2 0.2", "class nan"),
        ("inf 0.5 0.5 0.2 0.2", "class inf"),
        ("0 1.5 0.5 0.2 0.2", "outside of 0..1"),
        ("0 0.5 -0.1 0.2 0.2", "outside of 0..1"),
        ("0 nan 0.5 0.2 0.2", "not a finite number"),
        ("0 0.5 0.5 0 0.2", "without extent"),
        ("0 0.1 0.1 0.1 0.1 0.1 0.1", "without extent"),
        ("5 0.5 0.5 0.5 0.5", "repeats"),
    ],
)
def test_a_bad_line_is_named_and_left_out(line, reason):
    rows, problems = subject.parse_labels(f"5 0.5 0.5 0.5 0.5\n{line}\n7 0.5 0.5 0.1 0.1\n", "some/file.txt")
    assert rows[:, 0].tolist() == [5, 7]
    assert len(problems) == 1
    assert problems[0].startswith("some/file.txt:2: ")
    assert reason in problems[0]


@pytest.mark.parametrize(
    "image, expected",
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("/images/d/images/x.y.png", "/images/d/labels/x.y.txt"),
        ("d/images/a.JPEG", "d/labels/a.txt"),
        ("/d/myimages/a.png", "/d/myimages/a.txt"),
        ("/images/a.png", "/labels/a.txt"),
        ("/a.png", "/a.txt"),
        ("a.b.png", "a.b.txt"),
        ("images/images", "labels/images.txt"),
    ],
)
def test_the_last_images_folder_becomes_labels(image, expected):
    assert subject.label_path(image) == expected.replace("/", os.sep)


def test_folders_lists_and_lists_of_them(folder, monkeypatch):
    images = folder / "images" / "train"
    (images / "deeper").mkdir()
    shutil.move(images / "c.png", images / "deeper" / "c.PNG")
    (images / "readme.md").write_text("no image")
    everything = [str(images / name) for name in ("a.png", "b.png", os.path.join("deeper", "c.PNG"))]
    assert subject.list_images(images) == everything
    (folder / "some.txt").write_text(f"./images/train/b.png\n\n{everything[0]}\nnotes.md\n")
    listed = [str(folder / "images/train/b.png"), everything[0]]
    assert subject.list_images(folder / "some.txt") == listed
    assert subject.list_images([str(folder / "some.txt"), str(images / "deeper")]) == [*listed, everything[2]]
    (folder / "relative.txt").write_text("images/train/a.png\n")
    assert subject.list_images(folder / "relative.txt") == [str(folder / "images/train/a.png")]
    monkeypatch.chdir(folder)
    assert subject.list_images(folder / "relative.txt") == ["images/train/a.png"]
    with pytest.raises(UserError, match="nowhere"):
        subject.list_images(folder / "nowhere")
    with pytest.raises(UserError, match="no images"):
        subject.list_images(folder / "labels")


def test_what_is_wrong_is_counted_named_and_never_rewritten(folder, capsys):
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    (images / "broken.jpg").write_bytes(b"not a picture")
    write_image(images / "tiny.png", np.zeros((5, 50, 3), np.uint8))
    (labels / "c.txt").write_text("0 2 2 1 1\n0 0.5 0.5 0.1\n")
    write_image(images / "d.png", np.zeros((20, 30, 3), np.uint8))
    (labels / "d.txt").write_text("")
    write_image(images / "e.png", np.zeros((30, 20, 3), np.uint8))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    found = read(folder)
    assert [os.path.basename(file) for file in found.images] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert found.sizes.tolist() == [[30, 20]] * 4 + [[20, 30]]
    assert list(map(len, found.labels)) == [2, 1, 0, 0, 0]
    assert (found.missing, found.empty, found.corrupt, found.bad_lines) == (1, 2, 2, 2)
    text = capsys.readouterr().out
    assert "broken.jpg: is not an image" in text
    assert "tiny.png: 50x5" in text
    assert "c.txt:1:" in text
    assert {file: file.read_bytes() for file in before} == before


def test_only_the_first_problems_are_written_out(folder, capsys):
    (folder / "labels/train/a.txt").write_text("bad\n" * 30)
    read(folder)
    assert capsys.readouterr().out.count("left out: ") == subject.NAMED_PROBLEMS


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of 1 images"):
        subject.read_labelled_images(tmp_path / "images", "val")


def test_the_cache_saves_reading_and_notices_edits(folder, monkeypatch):
    reads = []
    original = subject.read_entry
    monkeypatch.setattr(
        subject, "read_entry", lambda image, labelled: (reads.append(image), original(image, labelled))[1]
    )
    first = read(folder)
    assert len(reads) == 3
    assert (folder / "labels" / "train.labels.cache").is_file()
    reads.clear()
    second = read(folder)
    assert reads == []
    assert list(second.images) == list(first.images)
    assert all(np.array_equal(a, b) for a, b in zip(first.labels, second.labels, strict=True))
    np.testing.assert_array_equal(first.sizes, second.sizes)

    label = folder / "labels" / "train" / "a.txt"
    label.write_text("1 0.5 0.5 0.2 0.2\n2 0.25 0.25 0.5 0.5\n")  # as long as before
    status = label.stat()
    os.utime(label, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert read(folder).labels[0][:, 0].tolist() == [1, 2]
    assert [os.path.basename(image) for image in reads] == ["a.png"]
    (folder / "labels" / "train" / "c.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert len(read(folder).labels[2]) == 1
    label.unlink()
    assert len(read(folder).labels[0]) == 0
    (folder / "images" / "train" / "b.png").unlink()
    assert len(read(folder).images) == 2


def test_a_foreign_or_broken_cache_is_replaced(folder):
    first = read(folder)
    cache = folder / "labels" / "train.labels.cache"
    whole = cache.read_bytes()
    for content in (b"", b"\x80\x04pickle?", whole[: len(whole) // 2]):
        cache.write_bytes(content)
        assert np.array_equal(read(folder).labels[0], first.labels[0])
        assert subject.load_cache(cache) is not None
    assert [file.name for file in cache.parent.iterdir() if file.is_file()] == [cache.name]  # no temporary files left


@pytest.mark.parametrize(
    "change",
    [
        {"version": np.array(1)},
        {"stamps": np.zeros((2, 4), np.int64)},
        {"sizes": np.zeros((3, 3), np.int64)},
        {"sizes": np.zeros((3, 2))},
        {"rows": np.zeros((2, 5), np.float32)},
        {"rows": np.zeros((3, 5), np.float64)},
        {"counts": np.array([4, -1, 0])},
        {"counts": np.array([2, 1])},
        {"texts": np.frombuffer(b'["a"]', np.uint8)},
        {"texts": np.frombuffer(b'{"images": ["a", "b", "c"], "corrupt": {"7": ""}, "problems": {}}', np.uint8)},
        {"rows": np.array([{"an": "object"}] * 3)},
    ],
)
def test_a_cache_whose_parts_do_not_fit_is_not_used(folder, change):
    read(folder)
    file = folder / "labels" / "train.labels.cache"
    with np.load(file) as arrays:
        parts = dict(arrays)
    with open(file, "wb") as stream:
        np.savez(stream, **parts)
    assert subject.load_cache(file) is not None
    with open(file, "wb") as stream:
        np.savez(stream, **parts | change)
    assert subject.load_cache(file) is None
    assert list(map(len, read(folder).labels)) == [2, 1, 0]


def test_a_list_in_another_order_and_with_repetitions_uses_the_cache(folder, monkeypatch):
    images = folder / "images" / "train"
    (folder / "labels/train/b.txt").write_text("1 0.5 0.5 0.2 0.2\nbad\n")
    (images / "d.png").write_bytes(b"no picture")
    some = folder / "some.txt"
    some.write_text("".join(f"./images/train/{name}.png\n" for name in "abcd"))
    subject.read_labelled_images(some, "train")
    monkeypatch.setattr(subject, "read_entry", None)  # nothing may be read again
    some.write_text("".join(f"./images/train/{name}.png\n" for name in "cdbacdb"))
    found = subject.read_labelled_images(some, "train")
    assert [os.path.basename(file) for file in found.images] == [f"{name}.png" for name in "cbacb"]
    assert [len(rows) for rows in found.labels] == [0, 1, 2, 0, 1]
    assert found.sizes.tolist() == [[30, 20]] * 5
    assert (found.missing, found.corrupt, found.bad_lines) == (2, 2, 2)


def test_problems_are_reported_from_the_cache_too(folder, capsys):
    (folder / "labels/train/a.txt").write_text("bad line\n")
    read(folder)
    first = capsys.readouterr().out
    read(folder)
    assert capsys.readouterr().out == first
    assert "a.txt:1:" in first


def test_a_read_only_folder_is_left_alone(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (folder / "labels").chmod(0o555)
    try:
        first, second = read(folder), read(folder)
    finally:
        (folder / "labels").chmod(0o755)
    assert np.array_equal(first.labels[0], second.labels[0])
    assert not list((folder / "labels").glob("*.cache"))
    assert len(list((tmp_path / "home" / "yolov5_qat").glob("train-*.labels.cache"))) == 1
