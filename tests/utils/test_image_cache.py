import copy
import os
import pickle

import numpy as np
import pytest

from utils import image_cache as subject
from utils.dataset import DetectionDataset
from utils.errors import UserError
from utils.images import read_image, write_image


@pytest.fixture
def images():
    """Pictures of several sizes, more than are decoded ahead."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*rng.integers(5, 90, 2), 3), np.uint8) for _ in range(subject.BLOCK + 11)]


@pytest.fixture
def shapes(images):
    return np.array([image.shape[:2] for image in images])


def assert_holds(cache, images):
    assert len(cache) == len(images)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(cache[index], image)


def free(monkeypatch, memory=None, disk=None):
    """Pretends that so many bytes are free: the only way to fill a machine's memory in a test."""
    if memory is not None:
        monkeypatch.setattr(subject, "available_memory", lambda: memory)
    if disk is not None:
        monkeypatch.setattr(subject.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": disk}))


def test_memory_is_said_before_it_is_taken_and_is_all_that_is_taken(images, shapes, capsys, monkeypatch):
    size = sum(image.nbytes for image in images)
    said = []
    free(monkeypatch, memory=2**21)

    def read(index):
        said.append(capsys.readouterr().out)
        return images[index]

    monkeypatch.setattr(subject, "READERS", 1)
    cache = subject.cache_in_memory(shapes, read, "train")
    assert said[0] == f"train: caching: 75 images need {size / 2**20:.1f} MiB of memory of 2.0 MiB that are free\n"
    assert size > 2**18
    assert_holds(cache, images)
    assert cache.content.nbytes == size


@pytest.mark.parametrize("copies", [1, 3])
def test_too_little_memory_is_refused_with_numbers(images, shapes, capsys, monkeypatch, copies):
    needed = copies * sum(image.nbytes for image in images)
    free(monkeypatch, memory=needed / 0.8 + 1)
    assert subject.cache_in_memory(shapes, images.__getitem__, "train", copies) is not None
    capsys.readouterr()
    free(monkeypatch, memory=needed / 0.8 - 1)
    assert subject.cache_in_memory(shapes, None, "train", copies) is None  # so nothing is read either
    text = capsys.readouterr().out
    size = subject.megabytes(needed // copies)
    assert f"not cached: 75 images need {'3 x ' if copies == 3 else ''}{size} of memory, " in text
    assert f"{subject.megabytes(int(needed / 0.8))} are free, of which 80% may be taken" in text
    assert "--cache disk" in text


def test_an_image_of_another_size_than_announced_is_an_error(images, shapes):
    shapes[70] += 1
    with pytest.raises(UserError, match="image 70 has changed"):
        subject.cache_in_memory(shapes, images.__getitem__, "train")


def test_a_file_is_written_once_and_used_again(images, shapes, tmp_path):
    files, digest = [tmp_path / "some.npy"], bytes(range(32))
    assert_holds(subject.cache_on_disk(files, digest, shapes, images.__getitem__, "train"), images)
    again = subject.cache_on_disk(files, digest, shapes, None, "train")  # None: nothing is read
    assert_holds(again, images)
    assert np.load(files[0]).nbytes == sum(image.nbytes for image in images) + 32
    assert_holds(copy.copy(again), images)  # as a worker process gets it: its state, the file mapped anew
    assert len(pickle.dumps(again)) < 5000 < files[0].stat().st_size  # a worker is sent the name, not the content
    with pytest.raises(ValueError):
        again[0][:] = 0
    assert [file.name for file in tmp_path.iterdir()] == ["some.npy"]


@pytest.mark.parametrize("damage", ["digest", "cut", "empty", "pickle", "dtype", "shapes"])
def test_another_or_a_damaged_file_is_written_anew(images, shapes, tmp_path, damage):
    file, digest = tmp_path / "some.npy", bytes(range(32))
    subject.cache_on_disk([file], digest, shapes, images.__getitem__, "train")
    whole = file.read_bytes()
    assert subject.open_file(file, digest, shapes) is not None
    if damage == "digest":
        digest = bytes(32)
    elif damage == "shapes":
        shapes, images = shapes[1:], images[1:]
    elif damage == "pickle":
        np.save(file, np.array([{"an": "object"}]), allow_pickle=True)
    elif damage == "dtype":
        np.save(file, np.load(file).astype(np.int8))
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert subject.open_file(file, digest, shapes) is None
    assert_holds(subject.cache_on_disk([file], digest, shapes, images.__getitem__, "train"), images)
    assert subject.open_file(file, digest, shapes) is not None


def test_places_that_cannot_be_written_to(images, shapes, tmp_path, capsys, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    other = tmp_path / "other" / "b.npy"
    assert (
        subject.cache_on_disk([locked / "a.npy", other], bytes(32), shapes, images.__getitem__, "train").file == other
    )
    other.unlink()
    free(monkeypatch, disk=2000)
    capsys.readouterr()
    assert subject.cache_on_disk([locked / "a.npy", other], bytes(32), shapes, None, "train") is None
    text = capsys.readouterr().out
    assert "marked read-only" in text
    assert "0.0 MiB are free" in text
    assert f"75 images need {sum(image.nbytes for image in images) / 2**20:.1f} MiB of disk space" in text
    locked.chmod(0o755)
    assert not list(locked.iterdir())


def test_a_failure_leaves_no_file(images, shapes, tmp_path):
    def read(index):
        if index == 66:
            raise UserError("gone")
        return images[index]

    with pytest.raises(UserError, match="gone"):
        subject.cache_on_disk([tmp_path / "a.npy"], bytes(32), shapes, read, "train")
    assert not list(tmp_path.iterdir())


def test_the_data_set_renews_its_file_when_an_image_changes(tiny_dataset):
    folder = tiny_dataset.parent / "images" / "train"
    file = tiny_dataset.parent / "labels" / "train.64-smooth.images.npy"

    def dataset(size=64, **options):
        return DetectionDataset(folder, size, cache="disk", **options)

    first = dataset()
    written = file.stat().st_mtime_ns
    dataset()
    assert file.stat().st_mtime_ns == written
    image = first.image_files[3]
    write_image(image, 255 - read_image(image))
    status = os.stat(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    second = dataset()
    assert file.stat().st_mtime_ns != written
    plain = DetectionDataset(folder, 64)
    for index in range(8):
        np.testing.assert_array_equal(second.load_image(index), plain.load_image(index))
    assert not np.array_equal(first.load_image(3), second.load_image(3))
    dataset(size=32)
    dataset(hyp={"mosaic": 1.0}, augment=True)
    names = {"train.64-smooth.images.npy", "train.32-smooth.images.npy", "train.64.images.npy"}
    assert {entry.name for entry in file.parent.glob("*.npy")} == names
