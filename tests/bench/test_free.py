"""Free memory, as systems of several kinds tell it."""

import resource
import sys
import types

import pytest

from negengine.bench import free

GIB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a system with 8 GiB available, and no limit of the process."""
    monkeypatch.setattr(free, "ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))

    write({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n"})
    return write


def test_what_the_system_has(system):
    assert free.free_bytes("cpu") == 8 * GIB


@pytest.mark.parametrize("limit, left", [("max", 8 * GIB), (3 * GIB, 2 * GIB), (1 << 60, 8 * GIB), (GIB // 2, 0)])
def test_groups_of_version_2(system, limit, left):
    system({"proc/self/cgroup": "0::/user/mine\n"})
    system({"sys/fs/cgroup/user/memory.max": limit, "sys/fs/cgroup/user/memory.current": GIB})
    system({"sys/fs/cgroup/user/mine/memory.max": "max", "sys/fs/cgroup/user/mine/memory.current": 0})
    assert free.free_bytes("cpu") == left


def test_what_files_occupy_is_free(system):
    system({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/cgroup/memory.current": 3 * GIB})
    system({"sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n"})
    assert free.free_bytes("cpu") == 3 * GIB


def test_groups_of_version_1(system):
    system({"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box/mine\n0::/\n"})
    system({"sys/fs/cgroup/memory/memory.limit_in_bytes": 6 * GIB, "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB})
    assert free.free_bytes("cpu") == 5 * GIB
    system({"sys/fs/cgroup/memory/box/memory.limit_in_bytes": 2 * GIB})
    system({"sys/fs/cgroup/memory/box/memory.usage_in_bytes": GIB})
    assert free.free_bytes("cpu") == GIB


def test_the_process_s_own_limit(system, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (4 * GIB, 4 * GIB))
    monkeypatch.setattr(resource, "getpagesize", lambda: 4096)
    system({"proc/self/statm": f"{3 * GIB // 4096} 1 1 1 0 1 0\n"})
    assert free.free_bytes("cpu") == GIB


def test_a_system_without_these_files(system, tmp_path, monkeypatch):
    (tmp_path / "proc" / "meminfo").unlink()
    told = types.ModuleType("psutil")
    told.virtual_memory = lambda: types.SimpleNamespace(available=5)
    monkeypatch.setitem(sys.modules, "psutil", told)
    monkeypatch.setattr(free.importlib.util, "find_spec", lambda name: object())
    assert free.free_bytes("cpu") == 5
    monkeypatch.setattr(free.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install psutil"):
        free.free_bytes("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads this system's own files")
def test_here():
    assert 0 < free.free_bytes("cpu") < 1 << 50
