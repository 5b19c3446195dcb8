"""What memory there is and what is held, read from made-up systems and from this one."""

import platform
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from offload import MemoryWatch, ProcessMemory, available_device_bytes, available_host_bytes, process_memory
from offload.memory import cgroup_available_bytes

MIB = 1 << 20
GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(group: str, limit: object, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{group}".rstrip("/")
    stat = f"anon 5\nfile 7\ninactive_anon 99999999\ninactive_file {inactive}\nactive_file 3"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def v1(group: str, limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{group}".rstrip("/")
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": stat,
    }


def left(root: Path) -> list[int]:
    return list(cgroup_available_bytes(root))


def test_a_v2_limit_less_what_is_used_is_left(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **v2("job", 4 * GIB, GIB)})

    assert left(root) == [3 * GIB]


def test_a_tight_group_binds(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **v2("job", 3 * MIB, 2 * MIB)})

    assert available_host_bytes(root) == MIB


def test_page_cache_that_can_be_dropped_counts_as_left(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **v2("job", 10 * MIB, 10 * MIB, inactive=4 * MIB)})

    assert available_host_bytes(root) == 4 * MIB


def test_the_tightest_group_up_to_the_root_binds(tmp_path: Path) -> None:
    groups = v2("a", 9 * MIB, 8 * MIB) | v2("a/b", "max", 3 * MIB) | v2("a/b/c", 6 * MIB, 2 * MIB)
    root = write(tmp_path, {"proc/self/cgroup": "0::/a/b/c", **groups})

    assert left(root) == [4 * MIB, MIB]
    assert available_host_bytes(root) == MIB


def test_a_high_mark_binds_as_a_limit_does(tmp_path: Path) -> None:
    high = {"sys/fs/cgroup/job/memory.high": 5 * MIB}
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **v2("job", "max", 2 * MIB), **high})

    assert left(root) == [3 * MIB]


def test_a_v1_limit_binds_and_so_does_the_one_above_it(tmp_path: Path) -> None:
    listing = "9:name=systemd:/x\n4:cpu,memory:/a/b\n2:memoryless:/nowhere\n0::/"
    groups = v1("a/b", 8 * MIB, 6 * MIB, inactive=3 * MIB) | v1("a", 9 * MIB, 7 * MIB) | v1("", 2**63 - 4096, 7 * MIB)
    root = write(tmp_path, {"proc/self/cgroup": listing, **groups})

    assert left(root)[:2] == [5 * MIB, 2 * MIB]
    assert available_host_bytes(root) == 2 * MIB


def test_a_v2_tree_beside_v1_is_found(tmp_path: Path) -> None:
    files = {name.replace("cgroup/", "cgroup/unified/"): value for name, value in v2("job", 3 * MIB, MIB).items()}
    root = write(tmp_path, {"proc/self/cgroup": "4:memory:/\n0::/job", **files})

    assert left(root) == [2 * MIB]


def test_a_container_that_sees_a_path_outside_its_mount_reads_the_mount(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/../../other", **v2("", 3 * MIB, MIB)})
    write(tmp_path, {"sys/fs/memory.max": 7, "sys/fs/memory.current": 7})

    assert left(root) == [2 * MIB]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": ""},
        {"proc/self/cgroup": "no colons here\n1:"},
        {"proc/self/cgroup": "0::/gone"},
        {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max": 5},
        {"proc/self/cgroup": "0::/job", **v2("job", "max", 5)},
        {"proc/self/cgroup": "0::/job", **v2("job", "-1", 5)},
        {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max/is/a/folder": 1},
    ],
)
def test_without_a_readable_limit_the_machine_is_the_limit(tmp_path: Path, files: dict[str, object]) -> None:
    root = write(tmp_path, files)

    assert left(root) == []
    assert 0 < available_host_bytes(root) <= psutil.virtual_memory().total


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **v2("job", 3 * MIB, 5 * MIB, inactive=MIB)})

    assert available_host_bytes(root) == 0


def test_no_more_cache_is_dropped_than_there_is(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **v2("job", 3 * MIB, MIB, inactive=50 * MIB)})

    assert left(root) == [3 * MIB]


def test_resident_memory_is_told_by_kind(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(
        "Name:\tpython kB\nVmHWM:\t  900 kB\nVmRSS:\t 600 kB\n"
        "RssAnon:\t 100 kB\nRssFile:\t 200 kB\nRssShmem:\t 300 kB\nSigQ:\t0/1\n"
    )

    memory = process_memory(status)

    assert memory == ProcessMemory(anonymous=100 << 10, file_backed=200 << 10, shared=300 << 10, peak=900 << 10)
    assert memory.resident == 600 << 10


@pytest.mark.parametrize("text", ["", "VmHWM: 900 kB\nRssAnon: 1 kB\n", "RssAnon: x kB\n"])
def test_where_the_kernel_tells_no_kinds_all_counts_as_anonymous(tmp_path: Path, text: str) -> None:
    (tmp_path / "status").write_text(text)

    memory = process_memory(tmp_path / "status")

    assert memory.anonymous > MIB
    assert memory.file_backed == memory.shared == 0
    assert memory.peak >= memory.anonymous


@pytest.mark.skipif(platform.system() != "Linux", reason="reads the kernel's account of pages")
def test_memory_of_this_process_shows_up_under_its_kind(tmp_path: Path) -> None:
    before = process_memory()
    ones = torch.ones(64 * MIB, dtype=torch.uint8)

    after = process_memory()

    assert after.anonymous - before.anonymous > 48 * MIB
    assert after.peak >= after.anonymous
    assert ones.nbytes == 64 * MIB


class Samples:
    """A process whose memory goes through a list, the last value for ever; `seen` is set at its end."""

    def __init__(self, *values: tuple[int, int]) -> None:
        self.seen = threading.Event()
        self._values = list(values)

    def __call__(self) -> ProcessMemory:
        anonymous, file_backed = self._values[0]
        if len(self._values) > 1:
            self._values.pop(0)
        else:
            self.seen.set()
        return ProcessMemory(anonymous, file_backed, shared=1000, peak=10_000)


def test_a_watch_keeps_both_peaks_whenever_they_were() -> None:
    samples = Samples((5, 1), (70, 2), (6, 90), (4, 3))

    with MemoryWatch(interval=1e-3, sample=samples) as watch:
        assert samples.seen.wait(30)

    assert (watch.peak_anonymous, watch.peak_file_backed) == (70, 90)
    assert "offload-memory-watch" not in [thread.name for thread in threading.enumerate()]


def test_a_watch_sees_both_ends_of_a_block_shorter_than_its_interval() -> None:
    with MemoryWatch(interval=1000, sample=Samples((1, 50), (60, 2))) as watch:
        pass

    assert watch.samples == 2
    assert (watch.peak_anonymous, watch.peak_file_backed) == (60, 50)


def test_a_watch_ends_with_an_error_of_its_block() -> None:
    with pytest.raises(ZeroDivisionError), MemoryWatch(interval=1e-3):
        _ = 1 / 0

    assert "offload-memory-watch" not in [thread.name for thread in threading.enumerate()]


def test_the_processor_has_the_memory_of_the_host() -> None:
    available = available_device_bytes("cpu")

    assert available is not None
    assert 0 < available <= psutil.virtual_memory().total


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no device cuda:1 here; use cpu"):
        available_device_bytes("cuda:1")


def test_what_the_allocator_holds_for_nobody_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=lambda device: (5000, 9000),
        memory_reserved=lambda device: 3000,
        memory_allocated=lambda device: 1000,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: card)

    assert available_device_bytes("cuda") == 7000


@pytest.mark.cuda  # asks the driver
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: asks its driver")
def test_a_card_tells_what_is_free() -> None:
    available = available_device_bytes("cuda")

    assert available is not None
    assert 0 < available <= torch.cuda.get_device_properties(0).total_memory
