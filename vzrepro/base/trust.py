"""Who may have made a file that decides what vzrepro does: the caller, root, and who owns vzrepro itself.

A workspace is found by searching upwards, and its recipes and settings are obeyed. So nobody else may have made it, and
nobody else may be able to write to it (docs/design.md has the rule and its reasons). Standard library only, and few
calls: the no-op path asks here.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False  # not from `typing`, whose import costs milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

RELIED_ON = ("recipes", "pyproject.toml", "lock.toml", "sbom.toml")
"""What in a workspace decides what is built, besides the workspace's own directory."""


def uids(environ: Mapping[str, str]) -> frozenset[int]:
    """Whose files are used: the caller's, root's, and those of the owner of vzrepro's own code, which runs already.

    To root, as git has it, also those of the user who called sudo.
    """
    found = {0, os.geteuid(), os.stat(os.path.dirname(os.path.abspath(__file__))).st_uid}
    caller = environ.get("SUDO_UID", "")
    if os.geteuid() == 0 and caller.isascii() and caller.isdigit():
        found.add(int(caller))
    return frozenset(found)


def standing(root: str, environ: Mapping[str, str]) -> str:
    """What trust in a workspace depends on besides its files' own stats: a line, to be compared."""
    found = os.stat(root)
    return f"trusted {sorted(uids(environ))} {found.st_uid} {found.st_gid} {found.st_mode}"


def doubt(paths: Iterable[str], environ: Mapping[str, str]) -> tuple[str, str, str | None] | None:
    """The first of `paths` that somebody else made or can write to, what is wrong with it, and a command that mends it,
    if there is one. Of a link both the link and what it leads to count; what the caller cannot find is beyond doubt."""
    known = uids(environ)
    for path in paths:
        try:
            itself = os.lstat(path)
            meant = os.stat(path) if stat.S_ISLNK(itself.st_mode) else itself
        except OSError:  # the caller cannot use it either
            continue
        for found in (itself, meant):
            if found.st_uid not in known:
                return path, f"it belongs to {user(found.st_uid)}", None
        if meant.st_mode & stat.S_IWOTH:
            return path, "anybody may write to it", f"chmod go-w {path}"
        if meant.st_mode & stat.S_IWGRP and not _is_private(meant.st_uid, meant.st_gid):
            return path, f"the group {_group(meant.st_gid)} may write to it", f"chmod g-w {path}"
    return None


def relied_on(root: str) -> Iterator[str]:
    """The workspace, its settings and pins, and everything in its recipes/: what must be beyond doubt."""
    yield root
    for name in RELIED_ON:
        yield os.path.join(root, name)
    yield from _below(os.path.join(root, "recipes"), set())


def _below(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads up
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            found = [(entry.path, entry.is_dir()) for entry in entries]
    except OSError:  # nobody can read recipes there
        return
    for path, is_dir in found:
        yield path
        if is_dir:
            yield from _below(path, seen)


def user(uid: int) -> str:
    """A user as messages name one."""
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _is_private(uid: int, gid: int) -> bool:
    """Whether the group is its owner's alone, as most systems make one for each user, who then may have umask 002.

    Known by the user's name and no further members; where neither has a name (a container), by the equal number.
    """
    import grp
    import pwd

    try:
        group, owner = grp.getgrgid(gid), pwd.getpwuid(uid).pw_name
    except KeyError:
        return uid == gid
    return group.gr_name == owner and set(group.gr_mem) <= {owner}


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"with gid {gid}"
