"""Files that appear when they are whole."""

from __future__ import annotations

from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write `path`; readers find the old file or the new one, never half of it.

    What has the name of the temporary file is removed, not written to: in a folder that came from somebody
    else it may be a link to any file.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    temporary.replace(path)
