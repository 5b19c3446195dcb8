"""What the file system of a test's folder can be expected to do."""

from pathlib import Path

import psutil
import pytest

# Others live in memory (tmpfs), or keep their pages under another file (overlay) or on another machine.
WITH_PAGE_CACHE = {"ext4", "xfs", "btrfs", "f2fs"}


def require_page_cache(path: Path) -> None:
    """Skip the test unless what is read of a file in this folder lies in the page cache under that file."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[folder] for folder in (path.resolve(), *path.resolve().parents) if folder in mounts), "")
    if kind not in WITH_PAGE_CACHE:
        pytest.skip(f"a file system ({kind or 'unknown'}) with another page cache or none")
