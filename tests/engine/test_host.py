"""How many threads and how much memory this process may take, in a container too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starling.engine.cgroup import cpu_quota, memory_left
from starling.engine.host import available_memory, default_threads

GIB = 2**30


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A root folder with /proc/self/cgroup and files below /sys/fs/cgroup."""
    whole = {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in whole.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


V2 = {
    "pod/cpu.max": "400000 100000",
    "pod/memory.max": str(8 * GIB),
    "pod/memory.current": str(2 * GIB),
    "pod/memory.stat": f"anon 5\ninactive_file {GIB}",
    "pod/main/cpu.max": "max 100000",
    "pod/main/memory.max": "max",
    "pod/main/memory.current": str(GIB),
}
V1 = {
    "cpu,cpuacct/pod/cpu.cfs_quota_us": "150000",
    "cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
    "cpu,cpuacct/cpu.cfs_quota_us": "-1",
    "cpu,cpuacct/cpu.cfs_period_us": "100000",
    "memory/pod/memory.limit_in_bytes": str(4 * GIB),
    "memory/pod/memory.usage_in_bytes": str(5 * GIB),
    "memory/pod/memory.stat": f"cache 7\ntotal_inactive_file {2 * GIB}",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/memory.usage_in_bytes": str(6 * GIB),
}


@pytest.mark.parametrize(
    ("groups", "files", "cpus", "memory"),
    [
        pytest.param("0::/pod/main", V2, 4.0, 7 * GIB, id="version 2, limits on the group above"),
        pytest.param("0::/elsewhere", {"cpu.max": "50000 100000"}, 0.5, None, id="version 2, the host's path"),
        pytest.param("4:memory:/pod\n1:cpu,cpuacct:/pod", V1, 1.5, GIB, id="version 1"),
        pytest.param("1:cpu,cpuacct:/", V1, None, None, id="version 1, no limit"),
        pytest.param("0::/../../x", {"cpu.max": "max 100000"}, None, None, id="a path that leads out"),
        pytest.param("nonsense\n0::", {"cpu.max": "x y", "memory.max": "", "memory.current": ""}, None, None, id="bad"),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], cpus: float | None, memory: int | None
) -> None:
    root = system(tmp_path, groups, files)
    assert cpu_quota(root) == cpus
    assert memory_left(root) == memory


def test_a_system_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_left(tmp_path) is None


def test_a_process_with_a_quota_of_one_cpu_takes_one_thread(tmp_path: Path) -> None:
    hierarchy = Path("/sys/fs/cgroup/cpu")
    group = hierarchy / f"starling-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    program = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from starling.engine.host import default_threads; print(default_threads())"
    )
    try:
        command = [sys.executable, "-c", program, str(group / "cgroup.procs")]
        assert subprocess.check_output(command, text=True).strip() == "1"
    finally:
        group.rmdir()


def test_no_more_than_the_process_may_have() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
