"""What a container may use: the CPU quota and the memory limit of this process's control groups, versions 1 and 2.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: Where the hierarchies are mounted, below the root of the file system.
_MOUNT = "sys/fs/cgroup"


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs' time this process may use, the least of its groups' limits; None: no limit."""
    quotas = [_share(*_words(folder / "cpu.max")) for folder in _groups(root, "")]
    for folder in _groups(root, "cpu"):
        quotas.append(_share(*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take, the least of its groups' limits; None: no limit.

    What a group's files take in the page cache and are not in use is counted as free: the kernel gives it back.
    """
    left = [_left(folder, "memory.max", "memory.current", "inactive_file") for folder in _groups(root, "")] + [
        _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for folder in _groups(root, "memory")
    ]
    return min((most for most in left if most is not None), default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those that it is in; `controller` "" stands for version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller not in controllers.split(","):
            continue
        mounts = (controllers, controller) if controller else ("", "unified")
        mount = next((root / _MOUNT / name for name in mounts if (root / _MOUNT / name).is_dir()), None)
        if mount is None:
            continue
        group = mount / path.strip("/")
        # In a container the path may be the host's, and the mount its end.
        inner = group if group.is_dir() and ".." not in group.parts else mount
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def _words(file: Path) -> list[str]:
    with suppress(OSError, ValueError):
        return file.read_text(encoding="ascii").split()
    return []


def _share(quota: str = "max", period: str = "", *_: str) -> float | None:
    """CPUs of a quota and its period in microseconds; "max" and -1 are no quota."""
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def _left(folder: Path, limit: str, usage: str, unused: str) -> int | None:
    with suppress(ValueError):
        most, used = (int("".join(_words(folder / name))) for name in (limit, usage))
        counts = _words(folder / "memory.stat")
        cached = dict(zip(counts[::2], counts[1::2], strict=False)).get(unused, "0")
        return max(most - used + int(cached), 0)
    return None
