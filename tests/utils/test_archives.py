import io
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from utils.archives import unpack
from utils.errors import UserError

FILES = {"set/images/ä b.jpg": b"image" * 50, "set/labels/ä b.txt": b"0 .5 .5 .1 .1\n", "set/empty.txt": b""}


def tar_of(path: Path, members, mode: str = "w") -> Path:
    """An archive of (name, content) pairs or TarInfo objects."""
    with tarfile.open(path, mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def zip_of(path: Path, members, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive of (name or ZipInfo, content) pairs."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def special(kind: bytes, name: str = "set/link", target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip", "zip stored"])
def test_archives_are_unpacked_whatever_their_name(tmp_path, mode):
    members = [*FILES.items(), ("./set/dot", b"1"), ("__MACOSX/set/x", b"2"), ("set/.DS_Store", b"3")]
    if mode.startswith("zip"):
        compression = zipfile.ZIP_STORED if "stored" in mode else zipfile.ZIP_DEFLATED
        file = zip_of(tmp_path / "any", [("set/", b""), *members], compression)
    else:
        file = tar_of(tmp_path / "any", [special(tarfile.DIRTYPE, "set"), *members], mode)
    assert unpack(file, tmp_path / "out") == 4
    assert files_below(tmp_path / "out") == FILES | {"set/dot": b"1"}


@pytest.mark.parametrize(
    "name", ["/etc/evil", "../evil", "set/../../evil", "C:/evil", "C:evil", "\\evil", "..\\evil", "a\\..\\..\\evil"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_outside_of_the_folder_are_refused(tmp_path, name, kind):
    members = [("set/good", b"1"), (name, b"evil")]
    file = zip_of(tmp_path / "a.zip", members) if kind == "zip" else tar_of(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="outside of the folder"):
        unpack(file, tmp_path / "out")
    assert files_below(tmp_path / "out") == {"set/good": b"1"}
    assert {item.name for item in tmp_path.iterdir()} == {"out", file.name}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_folders_outside_of_the_folder_are_refused(tmp_path, kind):
    file = tmp_path / "a"
    _ = zip_of(file, [("../evil/", b"")]) if kind == "zip" else tar_of(file, [special(tarfile.DIRTYPE, "../evil")])
    with pytest.raises(UserError, match="outside of the folder"):
        unpack(file, tmp_path / "out")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "kind, target, reason",
    [
        (tarfile.SYMTYPE, "/etc", "a link"),
        (tarfile.SYMTYPE, "../..", "a link"),
        (tarfile.LNKTYPE, "../../secret", "a link"),
        (tarfile.LNKTYPE, "/etc/passwd", "a link"),
        (tarfile.CHRTYPE, "", "a device"),
        (tarfile.BLKTYPE, "", "a device"),
        (tarfile.FIFOTYPE, "", "a device or pipe"),
    ],
)
def test_links_devices_and_pipes_in_tar_are_refused(tmp_path, kind, target, reason):
    """The member after a link would be written through it."""
    (tmp_path / "secret").write_text("secret")
    file = tar_of(tmp_path / "a.tar", [special(kind, "set/link", target), ("set/link/evil", b"evil")])
    with pytest.raises(UserError, match=reason):
        unpack(file, tmp_path / "out")
    assert files_below(tmp_path / "out") == {} and (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("mode, reason", [(0o120777, "a link"), (0o020666, "a device")])
def test_links_and_devices_in_zip_are_refused(tmp_path, mode, reason):
    info = zipfile.ZipInfo("set/link")
    info.create_system, info.external_attr = 3, mode << 16
    with pytest.raises(UserError, match=reason):
        unpack(zip_of(tmp_path / "a.zip", [(info, b"../..")]), tmp_path / "out")
    assert files_below(tmp_path / "out") == {}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_is_refused(tmp_path, kind):
    """70 MB of zeros in less than 0.1 MB: more than a small archive may have."""
    zeros = [(f"zeros{number}", bytes(10_000_000)) for number in range(7)]
    file = zip_of(tmp_path / "a", zeros) if kind == "zip" else tar_of(tmp_path / "a", zeros, "w:gz")
    assert file.stat().st_size < 100_000
    with pytest.raises(UserError, match="unpack to 70 MB or more, 64 MB are allowed"):
        unpack(file, tmp_path / "out")
    assert len(files_below(tmp_path / "out")) == (0 if kind == "zip" else 6)


def test_the_allowed_size_can_be_given(tmp_path):
    file = zip_of(tmp_path / "a", [("x", b"12345")])
    with pytest.raises(UserError, match="allowed"):
        unpack(file, tmp_path / "out", largest=4)
    assert unpack(file, tmp_path / "out", largest=5) == 1


def test_a_member_that_lies_about_its_size_is_not_written_further(tmp_path):
    """Declared 5 bytes, holds 5 million: the local and the central header are changed alike."""
    content = bytes(5_000_000)
    file = zip_of(tmp_path / "a", [("x", content)])
    data = file.read_bytes().replace(struct.pack("<I", len(content)), struct.pack("<I", 5))
    data = data.replace(struct.pack("<I", zlib.crc32(content)), struct.pack("<I", zlib.crc32(content[:5])))
    file.write_bytes(data)
    unpack(file, tmp_path / "out")
    assert files_below(tmp_path / "out") == {"x": bytes(5)}


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zip"])
def test_broken_archives_are_a_message(tmp_path, mode, where):
    members = [(f"file{number}", bytes([number]) * 3000 + zlib.compress(bytes([number]))) for number in range(9)]
    file = zip_of(tmp_path / "a", members) if mode == "zip" else tar_of(tmp_path / "a", members, mode)
    data = file.read_bytes()
    position = int(len(data) * where)
    for damaged in (data[:position], data[:position] + b"\xff" * 40 + data[position + 40 :]):
        file.write_bytes(damaged)
        out = tmp_path / "out"
        try:
            unpack(file, out)
        except UserError as error:
            assert str(file) in str(error)
        else:  # the damage is behind the last file; or inside of one, for which plain tar has no checksum
            found = files_below(out)
            assert {name: len(content) for name, content in found.items()} == {
                name: len(content) for name, content in members
            }
            assert mode == "w" or found == dict(members)


def test_what_is_no_archive_is_a_message(tmp_path):
    (tmp_path / "page.zip").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="neither a zip nor a tar"):
        unpack(tmp_path / "page.zip", tmp_path / "out")


def test_encrypted_archives_are_a_message(tmp_path):
    file = zip_of(tmp_path / "a.zip", [("x", b"12345")])
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    data[6] |= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        unpack(file, tmp_path / "out")


def test_a_file_in_the_place_of_a_folder_is_a_message(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        unpack(tar_of(tmp_path / "a.tar", [("x", b"1"), ("x/y", b"2")]), tmp_path / "out")


def test_a_disk_that_takes_no_more_is_a_message(tmp_path):
    """A limit on file sizes stands for the full disk: both are refused writes in the middle of a file."""
    file = zip_of(tmp_path / "a.zip", [("x", bytes(100_000))])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "from utils.archives import unpack; unpack(sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "UserError" in result.stderr and "cannot be written while" in result.stderr, result.stderr


def test_no_permissions_come_along(tmp_path):
    info = tarfile.TarInfo("program")
    info.mode = 0o6777
    unpack(tar_of(tmp_path / "a.tar", [info]), tmp_path / "out")
    assert (tmp_path / "out" / "program").stat().st_mode & 0o6111 == 0
