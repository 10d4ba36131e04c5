"""Files that appear when they are whole, and stay."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: bytes | str) -> None:
    """Write `path`; readers, and whoever comes after a loss of power, find the old file or the new one.

    What has the name of the temporary file is removed, not written to: in a folder that came from somebody
    else it may be a link to any file.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")  # paths may be no UTF-8
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or the name can outlive a loss of power, and what is in the file not
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
