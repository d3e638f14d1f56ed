"""Files that appear whole or not at all."""

import stat

import pytest

from utils.paths import written_at_once


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with written_at_once(file) as stream:
        stream.write(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"
    with pytest.raises(RuntimeError), written_at_once(file) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_it_has_the_permissions_of_any_new_file(tmp_path):
    with written_at_once(tmp_path / "at_once"):
        pass
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("at_once", "plain")]
    assert modes[0] == modes[1]
