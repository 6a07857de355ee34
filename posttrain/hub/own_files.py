"""The files of a folder that a push or a merge takes: regular ones that lie in it; links are named and left out."""

from collections.abc import Iterable
from pathlib import Path

from posttrain.log import get_logger
from posttrain.visible import listed


def found(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Return the regular files of a folder that match, by their path in it; no links, and nothing behind one."""
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if is_own_file(path, folder)]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def is_own_file(path: Path, folder: Path) -> bool:
    """Tell whether a path is a regular file that lies in a folder itself: no link, and behind none. The folder's own
    path may have links in it.
    """
    inside = [path, *path.parents][: len(path.relative_to(folder).parts)]
    return path.is_file() and not any(part.is_symlink() for part in inside)


def links_in(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Return the paths in a folder that match, and are links or lie behind one, whatever they lead to."""
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    behind = (path for path in paths if not is_own_file(path, folder) and (path.is_symlink() or path.is_file()))
    return sorted(path.relative_to(folder).as_posix() for path in behind)


def name_links(folder: Path, patterns: Iterable[str]) -> None:
    """Say which links in a folder are left out."""
    links = links_in(folder, patterns)
    if links:
        get_logger().warning(
            "%s: %s left out: only regular files that lie in the folder itself are taken, and no link is followed",
            folder,
            listed(links),
        )
