"""The evaluation cache and the no-op path: what a command said, and says again while nothing changed.

After `realize TARGET…`, `targets` and `store path TARGET`, a memo keeps what the evaluation read (every file and
directory with its stat), the settings in the environment, and for each command what it printed and the stat of what
that rests on in the store. While all of that is unchanged, the answer is the same, and nothing else needs to be
imported. Anything unexpected is a miss: the long way then decides.

Only what costs next to nothing is imported, and the memo is text that is compared and never parsed:

    vzrepro memo 4                          the facts, a line each: this format, this vzrepro, Python, the workspace,
    …                                       the settings, and what trust in the workspace rests on
    <stat>⇥<path>                           a line for everything that was read
                                            an empty line, and for each command:
    store path busybox                      the command
    <stat>⇥<path>                           a line for everything that its answer rests on, or: inode <number>⇥<path>
    =/work/store/…                          a line for each that it printed
"""

from __future__ import annotations

import os
import sys
import zlib

from vzrepro.base import trust

TYPE_CHECKING = False  # not from `typing`, whose import costs milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_FORMAT = "vzrepro memo 4"
_PLACES = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")  # where the user's files are
_RACY_NS = 50_000_000  # a file changed this short before it was read could change again without its stat showing it
_NAMES = "names of targets"
_MAX_ENTRIES = 256  # of a larger object no more are looked at


def memo_path(root: str, environ: Mapping[str, str]) -> str:
    """Where the memo of the workspace `root` is: in the user's cache directory, never in the workspace."""
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "/nonexistent"), ".cache")
    return os.path.join(cache, "vzrepro", "evaluated", f"{os.path.basename(root)}-{zlib.crc32(os.fsencode(root)):08x}")


def answer(words: Sequence[str], environ: Mapping[str, str], *, terminal: bool) -> str | None:
    """What the command `words` prints, if it was remembered and nothing changed since, else None.

    `terminal` says whether stdout is one, where a table's heading is bold.
    """
    keys = _keys(words, environ, terminal)
    try:
        return _said(keys, _workspace(os.getcwd()), environ) if keys else None
    except OSError:  # no current directory
        return None


def names(folder: str, environ: Mapping[str, str]) -> list[str] | None:
    """What can be realized in the workspace that `folder` is in, if that was remembered and nothing changed since."""
    said = _said([_NAMES], _workspace(folder), environ)
    return None if said is None else said.split()


def _said(keys: Sequence[str], root: str | None, environ: Mapping[str, str]) -> str | None:
    if root is None:
        return None
    try:
        head, answers = _read(root, environ)
        facts = _facts(root, environ)
        if head[: len(facts)] != facts:
            return None
        rests, said = head[len(facts) :], []
        for key in keys:
            for line in answers[key].split("\n"):
                if line.startswith("="):
                    said.append(line[1:] + "\n")
                else:
                    rests.append(line)
        for line in rests:
            stat, _, path = line.partition("\t")
            if (_which(path) if stat.startswith("inode") else _stat(path)) != stat:
                return None
        return "".join(said)
    except (OSError, ValueError, LookupError):
        return None


def remember_realized(
    root: str, environ: Mapping[str, str], begun_ns: int, reads: Iterable[str], locations: Mapping[str, str]
) -> None:
    """Keep the answers to `realize TARGET` for `locations` (target → the object's place), as `remember` does."""
    answers = {f"realize {target}": (_entries(place), place) for target, place in locations.items()}
    _remember(root, environ, begun_ns, reads, answers)


def remember_names(
    root: str, environ: Mapping[str, str], begun_ns: int, reads: Iterable[str], found: Iterable[str]
) -> None:
    """Keep what `names` says, which does not depend on what is in the store. Else as `remember`."""
    _remember(root, environ, begun_ns, reads, {_NAMES: ({}, "\n".join(found))})


def remember(
    root: str,
    environ: Mapping[str, str],
    begun_ns: int,
    reads: Iterable[str],
    store: str,
    database: str,
    words: Sequence[str],
    text: str,
    *,
    terminal: bool,
) -> None:
    """Keep that the command `words` prints `text`, which depends on `reads` and on what is in a store (absolute paths).

    Objects come and go with a change of the directory `store`; `database` changes at other times, too, so that only
    which file it is counts.

    `begun_ns` is when the command began (`time.time_ns()`): what changed at that moment or later is not trusted, so
    nothing is kept then. Other answers stay while they rest on the same reads. Failing to write is no error.
    """
    seen = {store: _stat(store), database: _which(database)}
    if _are_racy([seen[store]], begun_ns):
        return
    for key in _keys(words, environ, terminal):
        _remember(root, environ, begun_ns, reads, {key: (seen, text)})


def _remember(
    root: str,
    environ: Mapping[str, str],
    begun_ns: int,
    reads: Iterable[str],
    answers: Mapping[str, tuple[Mapping[str, str], str]],
) -> None:
    seen = {path: _stat(path) for path in sorted(reads)}
    if _are_racy(seen.values(), begun_ns):
        return
    head = [*_facts(root, environ), *_lines(seen)]
    blocks: dict[str, str] = {}
    try:
        before, kept = _read(root, environ)
        if before == head:
            blocks = kept
    except (OSError, ValueError):
        pass
    for key, (rests, text) in answers.items():
        blocks[key] = "\n".join([*_lines(rests), *(f"={line}" for line in text.split("\n"))])
    names = [*seen, *(path for rests, _ in answers.values() for path in rests)]
    if any("\n" in name for name in (*names, *_facts(root, environ))):
        return  # what is not a line cannot be compared
    path = memo_path(root, environ)
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write("\n\n".join(["\n".join(head), *(f"{key}\n{block}" for key, block in blocks.items())]))
        os.replace(temporary, path)
    except OSError:
        _remove(temporary)  # a part of it, on a full disk


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


def _keys(words: Sequence[str], environ: Mapping[str, str], terminal: bool) -> list[str]:
    """Under what the memo has the answer to a command: `realize` for each target, none for what is not remembered."""
    words = list(words)
    if any(word.startswith("-") for word in words):
        return []
    if words[:1] == ["realize"]:
        return [f"realize {target}" for target in words[1:]]
    if words == ["targets"]:
        # Whether a table's heading is bold depends on these.
        return [f"targets on {environ.get('TERM')} {environ.get('NO_COLOR')}" if terminal else "targets"]
    if words[:2] == ["store", "path"] and len(words) == 3:
        return [f"store path {words[2]}"]
    return []


def _read(root: str, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The memo's facts and reads, and its answers."""
    with open(memo_path(root, environ), encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        head, *blocks = file.read().split("\n\n")
    answers = {}
    for block in blocks:
        key, _, rest = block.partition("\n")
        answers[key] = rest
    return head.split("\n"), answers


def _facts(root: str, environ: Mapping[str, str]) -> list[str]:
    settings = [
        f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith("VZREPRO_") or name in _PLACES
    ]
    python = sys.version.replace("\n", " ")
    return [_FORMAT, _package(), python, root, "\t".join(settings), trust.standing(root, environ)]


def _package() -> str:
    """Where this vzrepro is: another one, on the same workspace and store, need not say the same."""
    return os.path.dirname(os.path.realpath(__file__))


def _lines(stats: Mapping[str, str]) -> list[str]:
    return [f"{stat}\t{path}" for path, stat in stats.items()]


def _workspace(folder: str) -> str | None:
    """The nearest directory upwards that has recipes/, with links resolved as `config.find_workspace` does."""
    folder, own = os.path.realpath(folder), _package()
    while True:
        if folder != own and os.path.isdir(os.path.join(folder, "recipes")):
            return folder
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


def _stat(path: str) -> str:
    """What changes when a file does: times, size, inode and mode; `-` for none."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "-"
    return f"{found.st_mtime_ns} {found.st_ctime_ns} {found.st_size} {found.st_ino} {found.st_mode}"


def _which(path: str) -> str:
    """Which file it is, whatever happens to it; `-` for none."""
    try:
        return f"inode {os.lstat(path).st_ino}"
    except (FileNotFoundError, NotADirectoryError):
        return "-"


def _are_racy(stats: Iterable[str], begun_ns: int) -> bool:
    return any(stat != "-" and max(map(int, stat.split()[:2])) > begun_ns - _RACY_NS for stat in stats)


def _entries(location: str) -> dict[str, str]:
    """The object itself and what is in it. A lost, added or touched file changes one of these."""
    entries = {location: _stat(location)}
    pending = [location]
    while pending:
        folder = pending.pop()
        if not os.path.isdir(folder) or os.path.islink(folder):
            continue
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            entries[path] = _stat(path)
            pending.append(path)
            if len(entries) > _MAX_ENTRIES:
                return entries
    return entries
