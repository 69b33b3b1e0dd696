"""How much memory this process may still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
VERSIONS = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Folder, limit and use of control groups, version 2 and 1."""


def free_memory() -> int:
    """Bytes of memory that are free on the machine, and in the control groups of this process, such as a container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(_free_in(group) for group in _groups())]))


def _groups() -> list[tuple[Path, str, str]]:
    """The control groups of this process and those above them: folder, limit and use."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    found = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, use = VERSIONS[bool(controllers)]
        top = CGROUPS / root
        at = top / own.lstrip("/")
        found += [(folder, limit, use) for folder in (at, *at.parents) if folder == top or top in folder.parents]
    return found


def _free_in(group: tuple[Path, str, str]) -> int:
    """Bytes that a control group may still take; what it holds of files can be given back, and counts as free."""
    folder, limit, use = group
    try:
        most = int((folder / limit).read_text())  # "max" where there is no limit
        taken = int((folder / use).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**63
    return most - taken + int(stat.get("inactive_file", 0))
