import pytest

from utils.memory import available_memory

MEMINFO = "MemTotal:       2000 kB\nMemFree:         300 kB\nMemAvailable:   1000 kB\n"


@pytest.fixture
def system(tmp_path):
    """Folders as Linux has them: proc, and control groups of both versions."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    return proc, groups


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_machine_without_groups(system):
    assert available_memory(*system) == 1000 * 1024
    (system[0] / "meminfo").unlink()
    assert available_memory(*system) is None


def test_limits_of_groups_and_of_those_around_them(system):
    proc, groups = system
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    group(groups / "job" / "step", memory__max="max", memory__current=5, memory__stat="inactive_file 3")
    assert available_memory(proc, groups) == 1000 * 1024
    group(groups / "job", memory__max=90_000, memory__current=40_000, memory__stat="anon 1\ninactive_file 1000")
    assert available_memory(proc, groups) == 51_000
    group(groups / "job" / "step", memory__max=30_000)
    assert available_memory(proc, groups) == 30_000 - 5 + 3


def test_groups_of_version_1(system):
    proc, groups = system
    (proc / "self" / "cgroup").write_text("5:cpu,memory:/a\n3:cpuset:/b\n")
    files = {"memory__limit_in_bytes": 9000, "memory__usage_in_bytes": 10_000}
    group(groups / "memory" / "a", **files, memory__stat="total_inactive_file 2500")
    assert available_memory(proc, groups) == 1500
    group(groups / "memory" / "a", memory__stat="total_inactive_file 0")
    assert available_memory(proc, groups) == 0


def test_here():
    assert available_memory() is None or 0 <= available_memory() < 2**50
