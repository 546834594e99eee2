"""A folder of numbered pictures as a clip."""

from __future__ import annotations

import re
from pathlib import Path

from mc_runtime.errors import RequestError

_NUMBERED = re.compile(r"(\d+)\.(?:png|jpe?g|webp)$", re.IGNORECASE)


def numbered_frames(folder: Path) -> list[Path]:
    """The pictures of a folder whose names end in a number, by that number; other files are passed over.

    Raises RequestError: there is none, two have the same number, or the folder cannot be read.
    """
    try:
        names = [(path, _NUMBERED.search(path.name)) for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise RequestError(f"{folder}: cannot be read ({error.strerror}); change its permissions") from error
    found: dict[int, Path] = {}
    for path, match in sorted(names, key=lambda entry: entry[0].name):
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            twice = f"{found[number].name} and {path.name} are both frame {number}"
            raise RequestError(f"{folder}: {twice}; keep one clip a folder")
        found[number] = path
    if not found:
        raise RequestError(f"{folder}: holds no numbered frames; name them 0000.png, 0001.png and so on")
    return [found[number] for number in sorted(found)]
