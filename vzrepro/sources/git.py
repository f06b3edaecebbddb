"""`git_source`: the tree of one commit, by the program `git`, which only fetches and reads objects here.

The tree is written by `archive.write_tree`, from the objects themselves: attributes, filters, hooks, line endings and
the user's configuration have no say in it. Formats: git-ls-tree(1), git-cat-file(1) `--batch`, git-ls-remote(1).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn
from urllib.parse import urlsplit, urlunsplit

from vzrepro import nar
from vzrepro.base.errors import Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.net import AttemptFailed, engine, printable, scheme_of, shown
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import PinnedTree, SourcePin
from vzrepro.sources import fetch
from vzrepro.sources.archive import MAX_UNPACKED, write_tree
from vzrepro.sources.entries import CHUNK, MAX_PATH, ArchiveEntry, checked
from vzrepro.sources.fetch.mirroring import DownloadProgress, quiet
from vzrepro.sources.lookup import Lookup
from vzrepro.sources.url import rank

_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_MAX = 1024  # bytes of a pointer file (git-lfs, "Specification")
_MAX_LISTING = 128 << 20  # bytes of names: a commit whose trees are in each other has no end
_MAX_SUBMODULES = 1000
_STALL_SECS = 300.0
_VERSION = r"([0-9]{1,9}(?:\.[0-9]{1,9})*)"
_MAY_HAVE_IT = re.compile(r"unadvertised object|shallow|not valid|couldn't find remote ref")
"""What servers say that do not give a commit by its id, or not alone; or whose tag is gone."""
_HAS_IT_NOT = re.compile(r"not our ref")
_TRANSIENT = re.compile(
    r"returned error: (408|425|429|5..)|early EOF|RPC failed|hung up|Connection (reset|refused|timed out)|Recv failure"
)
_TRIES = 3
_SETTINGS = {
    "core.hooksPath": os.devnull,
    "fetch.unpackLimit": "1",  # so that what comes is one file, whose size is looked at
    "gc.auto": "0",
    "maintenance.auto": "false",
    "protocol.version": "2",
    "transfer.bundleURI": "false",
}
_PASSED_ON = ("PATH", "http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def resolve(want: Want, old: SourcePin | None, lookup: Lookup) -> SourcePin:
    """Pin a `git_source` (`lookup.Resolver`). Raises UsageError, RemoteError."""
    url, submodules = str(want.ask["url"]), bool(want.ask["submodules"])
    urls = lookup.mirrors.urls(url)
    tag = None
    if want.ask["rev"] is not None:
        commit = str(want.ask["rev"])
        version = commit[:12]
    else:
        tag, version, commit = _newest_tag(urls, str(want.ask["tag"]), lookup)
    before = None if old is None else old.file
    same = tag and old and isinstance(before, PinnedTree) and (before.url, old.version) == (url, version)
    if same and isinstance(before, PinnedTree) and before.commit != commit:
        lookup.warn(f"the tag {tag} of {shown(url)} has moved: it was {before.commit}, is {commit}")
    lookup.downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=lookup.downloads) as folder:
        tree = Path(folder) / "tree"
        left_out = checkout(
            urls,
            commit,
            tree,
            tag=tag,
            submodules=submodules,
            max_bytes=lookup.max_bytes,
            report=lookup.progress,
            cancel=lookup.cancel,
        )
        nar_hash, size = nar.nar_hash(tree)
    lookup.say(f"{want.name}: commit {commit}, tree {nar_hash.nix}")
    if left_out:
        names = ", ".join([*left_out[:8], *(["…"] if left_out[8:] else [])])
        lookup.say(f"{want.name}: its submodules are left out ({names}); submodules=True takes them")
    return SourcePin(want.request, version, PinnedTree(url, commit, nar_hash, size))


def checkout(
    urls: Sequence[str],
    commit: str,
    dest: Path,
    *,
    tag: str | None = None,
    submodules: bool = False,
    max_bytes: int,
    report: DownloadProgress = quiet,
    cancel: threading.Event | None = None,
) -> list[str]:
    """Write the commit's tree to the new directory `dest`, from the first of `urls` that has it. Returns the paths of
    submodules whose directories stay empty, since `submodules` does not ask for them.

    `commit` is the id in hex, `tag` a tag that leads to it, for servers that give nothing else. At most `max_bytes` are
    fetched from one repository; `report` is told how many there are. Raises UsageError for what no tree can hold, for
    LFS and for an id of something else; RemoteError when nobody has the commit, NotFound when all have said so,
    Unreachable when none has;
    Interrupted.
    """
    failures: list[RemoteError] = []
    for url in urls:
        with tempfile.TemporaryDirectory(dir=dest.parent, prefix="git-") as folder:
            repository = _Repository(Path(folder), url, max_bytes, report, cancel or threading.Event())
            try:
                repository.fetch(commit, tag)
            except RemoteError as error:
                failures.append(error)
                continue
            dest.mkdir()
            links = repository.write(commit, dest)
            if not submodules:
                return list(map(printable, links))
            _add_submodules(repository, commit, links, dest, [0])
            return []
    first, *more = failures
    reason = "\n".join([first.reason or first.message, *(error.in_a_line for error in more)])
    gone = {isinstance(error, fetch.NotFound) for error in failures}
    kind = RemoteError if len(gone) > 1 else fetch.NotFound if gone == {True} else fetch.Unreachable
    raise kind(first.message, reason=reason, hint=first.hint)


def _add_submodules(above: _Repository, commit: str, links: Mapping[str, str], dest: Path, seen: list[int]) -> None:
    """Fill the directories that `links`, path → commit, name, and those below them. `seen` counts them all."""
    places = above.submodules(commit) if links else {}
    for path, wanted in links.items():
        seen[0] += 1
        if seen[0] > _MAX_SUBMODULES:
            raise UsageError(f"{shown(above.url)} has more than {_MAX_SUBMODULES} submodules")
        if path not in places:
            raise UsageError(
                f"{shown(above.url)} has a submodule {path} without a URL", reason="its .gitmodules does not name it"
            )
        url = _submodule_url(above.url, places[path], path)
        with tempfile.TemporaryDirectory(dir=above.folder.parent, prefix="git-") as folder:
            repository = above.other(Path(folder), url)
            try:
                repository.fetch(wanted, None)
            except RemoteError as error:
                missing = "name a commit whose submodules are all there, or do without submodules=True"
                raise type(error)(
                    f"the submodule {printable(path)} of {shown(above.url)} cannot be had: {error.message}",
                    reason=error.reason,
                    hint=missing if isinstance(error, fetch.NotFound) else error.hint,
                ) from error
            _add_submodules(repository, wanted, repository.write(wanted, dest / path), dest / path, seen)


def _submodule_url(above: str, url: str, path: str) -> str:
    """The URL of a submodule (gitsubmodules(7)): a relative one counts from the repository's own."""
    if url.startswith(("./", "../")):
        parsed = urlsplit(above)
        parts = parsed.path.rstrip("/").split("/")
        for part in url.split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in (".", ""):
                parts.append(part)
        return urlunsplit(parsed._replace(path="/".join(parts)))
    scheme = scheme_of(url)
    if scheme not in ("http", "https") and not (scheme == "file" and above.startswith("file:")):
        raise UsageError(
            f"the submodule {path} of {shown(above)} is at {printable(url)}",
            reason="a repository may only lead to http and https, and one on this machine to others here",
            hint="declare the submodule's repository as a git_source of its own",
        )
    return url


def _newest_tag(urls: Sequence[str], pattern: str, lookup: Lookup) -> tuple[str, str, str]:
    """The tag that `pattern` means, its version, and the commit that it leads to."""
    tags = _tags(urls, lookup)
    if "*" not in pattern:
        if pattern not in tags:
            _no_tag(urls[0], pattern, tags)
        return pattern, re.sub(r"^v(?=[0-9])", "", pattern), tags[pattern]
    expression = re.compile(_VERSION.join(map(re.escape, pattern.split("*"))))
    found = {tag: match.groups() for tag in tags if (match := expression.fullmatch(tag))}
    if not found:
        _no_tag(urls[0], pattern, tags)
    best = max(found, key=lambda tag: ([rank(number) for number in found[tag]], tag))
    return best, re.sub(r"^\D*(?=\d)", "", best), tags[best]


def _no_tag(url: str, pattern: str, tags: Mapping[str, str]) -> NoReturn:
    raise UsageError(
        f"{shown(url)} has no tag {pattern}",
        reason=f"it has {', '.join(list(tags)[-8:])}" if tags else "it has no tags at all",
        hint="a * in a pattern stands for a number, or several with dots between them",
    )


def _tags(urls: Sequence[str], lookup: Lookup) -> dict[str, str]:
    """Every tag of the first repository that answers, by name: the id of what it leads to."""
    failures: list[RemoteError] = []
    for url in urls:
        with tempfile.TemporaryDirectory() as folder:
            try:
                repository = _Repository(Path(folder), url, lookup.max_bytes, quiet, lookup.cancel)
                lines = repository.listing("ls-remote", "--tags", "--", url).decode(errors="replace").splitlines()
            except RemoteError as error:
                failures.append(error)
                continue
        # The line that ends with ^{} comes after that of the tag, and tells what an annotated tag leads to.
        pairs = [line.partition("\t")[::2] for line in lines]
        hexadecimal = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
        return {
            ref.removeprefix("refs/tags/").removesuffix("^{}"): found
            for found, ref in pairs
            if hexadecimal.fullmatch(found)
        }
    raise failures[0]


@dataclass(slots=True)
class _Repository:
    """A bare repository in `folder`, which is private and goes afterwards, for what is fetched from `url`."""

    folder: Path
    url: str
    max_bytes: int
    report: DownloadProgress
    cancel: threading.Event

    def other(self, folder: Path, url: str) -> _Repository:
        """One for another URL on the same terms."""
        return _Repository(folder, url, self.max_bytes, self.report, self.cancel)

    def fetch(self, commit: str, tag: str | None) -> None:
        """Have the commit here, alone if the server lets us. Raises RemoteError, UsageError."""
        kind = "sha256" if len(commit) == 64 else "sha1"
        self._git("init", "--quiet", "--bare", "--template=", f"--object-format={kind}", ".")
        ways = [["--depth=1", self.url, commit]]
        if tag is not None:
            ways.append(["--depth=1", self.url, f"refs/tags/{tag}"])
        ways.append([self.url, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"])
        nowhere = failure = "no branch or tag leads to it any more"
        for words in ways:
            try:
                self._retried("fetch", "--progress", "--no-tags", "--no-write-fetch-head", "--no-auto-gc", *words)
            except RemoteError as error:
                failure = error.reason or failure
                if not _MAY_HAVE_IT.search(failure):
                    if not _HAS_IT_NOT.search(failure):
                        raise
                    break
                continue
            if (found := self._type(commit)) == "commit":
                return
            failure = nowhere
            if found is not None:
                self._refuse(f"{commit} is a {found}, not a commit", f"git ls-remote {self.url}   (lines with ^{{}})")
        raise fetch.NotFound(
            f"{shown(self.url)} does not have the commit {commit}",
            reason=failure,
            hint="where history was rewritten, a shared cache may still have the source (caches = […]); to pin what is "
            "there now: vzrepro lock --update, after the recipe's rev where it has one",
        )

    def _type(self, object_id: str) -> str | None:
        try:
            return self.listing("cat-file", "-t", object_id).decode().strip()
        except RemoteError:
            return None

    def write(self, commit: str, dest: Path) -> dict[str, str]:
        """Write the commit's tree below the directory `dest`; the submodules in it, path → commit."""
        listed = self.listing("ls-tree", "-r", "-l", "-z", "--full-tree", commit)
        rows = [_row(each) for each in listed.split(b"\0") if each]
        size = sum(row.size for row in rows)
        if size > MAX_UNPACKED:
            self._refuse(f"its files have {size} bytes, more than {MAX_UNPACKED}")
        with self._blobs([row.object_id for row in rows if row.mode != _GITLINK]) as blobs:
            entries = checked(self._entries(rows, blobs), self._refuse)
            write_tree(entries, dest, self._refuse, max_bytes=MAX_UNPACKED, go_on=self._go_on)
        return {row.path: row.object_id for row in rows if row.mode == _GITLINK}

    def _entries(self, rows: Sequence[_Row], blobs: BinaryIO) -> Iterator[ArchiveEntry]:
        for row in rows:
            if any(part.lower() == ".git" for part in row.path.split("/")):
                self._refuse(f"it has a path that no git would write: {row.path!a}")
            if row.mode == _GITLINK:
                yield ArchiveEntry(row.path, "dir", 0, 0, "", iter(()))
                continue
            body = _blob(blobs, row, self._refuse)
            if row.mode == _SYMLINK:
                if row.size > MAX_PATH:
                    self._refuse(f"{row.path!a} is a link of {row.size} bytes")
                target = b"".join(body).decode("utf-8", "surrogateescape")
                yield ArchiveEntry(row.path, "symlink", 0, 0, target, iter(()))
                continue
            if row.size <= _LFS_MAX:
                data = b"".join(body)
                if data.startswith(_LFS):
                    raise UsageError(
                        f"{shown(self.url)} keeps {row.path} with Git LFS, which a git_source does not fetch",
                        reason="the commit has a pointer only; the content is elsewhere, where nobody need keep it",
                        hint="take a release's archive that holds it: url_source(…)",
                    )
                body = iter((data,))
            yield ArchiveEntry(row.path, "file", 0o755 if row.mode == _EXECUTABLE else 0o644, row.size, "", body)
            for _skipped in body:
                pass

    def submodules(self, commit: str) -> dict[str, str]:
        """Path → URL, as the commit's .gitmodules has them (gitmodules(5))."""
        try:
            blob = f"--blob={commit}:.gitmodules"
            listed = self.listing("config", "-z", blob, "--get-regexp", r"^submodule\..*\.(path|url)$")
        except RemoteError:
            return {}
        told: dict[str, dict[str, str]] = {}
        for each in listed.decode("utf-8", "surrogateescape").split("\0"):
            key, _, value = each.partition("\n")
            name, _, variable = key.removeprefix("submodule.").rpartition(".")
            told.setdefault(name, {})[variable] = value
        return {each["path"]: each["url"] for each in told.values() if {"path", "url"} <= each.keys()}

    # --- running git

    def _retried(self, *words: str, out: IO[bytes] | None = None) -> None:
        """Run what talks to the server, again if that may help."""

        def once() -> None:
            try:
                self._git(*words, out=out)
            except RemoteError as error:
                if not _TRANSIENT.search(error.reason or ""):
                    raise
                raise AttemptFailed(error.message, again=True) from error

        try:
            engine.persist(_Tries(self.cancel), once)
        except AttemptFailed as failure:
            assert isinstance(failure.__cause__, RemoteError)
            raise failure.__cause__ from None

    def listing(self, *words: str) -> bytes:
        """What a command says. Raises RemoteError with git's own words."""
        with tempfile.TemporaryFile(dir=self.folder) as out:
            (self._retried if words[0] == "ls-remote" else self._git)(*words, out=out)
            out.seek(0)
            return out.read()

    @contextlib.contextmanager
    def _blobs(self, object_ids: Sequence[str]) -> Iterator[BinaryIO]:
        """A stream of `cat-file --batch` of these objects."""
        read_end, write_end = os.pipe()
        with (
            os.fdopen(read_end, "rb", CHUNK) as blobs,
            tempfile.TemporaryFile(dir=self.folder) as wanted,
            tempfile.TemporaryFile(dir=self.folder) as dropped,
        ):
            with os.fdopen(write_end, "wb") as writer:
                wanted.write("".join(f"{each}\n" for each in object_ids).encode())
                wanted.seek(0)
                process = self._start(("cat-file", "--batch", "--buffer"), wanted, writer, dropped)
            try:
                yield blobs
            finally:
                _end(process)

    def _git(self, *words: str, out: IO[bytes] | None = None) -> None:
        """Run to the end, watching the time and what comes. Raises RemoteError, Interrupted."""
        with (
            tempfile.TemporaryFile(dir=self.folder) as err,
            Path(os.devnull).open("rb") as nothing,
            tempfile.TemporaryFile(dir=self.folder) as dropped,
        ):
            process = self._start(words, nothing, out or dropped, err)
            try:
                self._watch(process, out or dropped, err)
            finally:
                code = _end(process)
            if code != 0:
                err.seek(0)
                said = _failures(re.sub(rb"[^\r\n]*\r", b"", err.read()[-65536:]).decode(errors="replace"))
                raise RemoteError(
                    f"git {words[0]} failed for {shown(self.url)}",
                    reason="\n".join(said) or f"it ended with code {code}",
                    hint=next((hint for pattern, hint in _HINTS if pattern.search("\n".join(said))), _HINT),
                )

    def _start(self, words: Sequence[str], stdin: IO[bytes], stdout: IO[bytes], stderr: IO[bytes]) -> Any:
        import sh

        options = [word for key, value in _SETTINGS.items() for word in ("-c", f"{key}={value}")]
        try:
            command: Any = sh.Command("git")  # whose stubs know no descriptors
            return command(
                *options,
                *words,
                _in=stdin.fileno(),
                _out=stdout.fileno(),
                _err=stderr.fileno(),
                _cwd=str(self.folder),
                _env=_environment(self.folder),
                _bg=True,
                _bg_exc=False,
                _new_session=True,
            )
        except sh.CommandNotFound as error:
            raise VzreproError("git is not installed", hint="apt-get install git") from error

    def _watch(self, process: Any, out: IO[bytes], err: IO[bytes]) -> None:
        """Return when the process ends, or raise because it has to."""
        pause, before, moved = 0.002, -1, time.monotonic()
        while process.is_alive():
            self._go_on()
            heard = self._come(out) + os.fstat(err.fileno()).st_size
            if heard != before:
                before, moved = heard, time.monotonic()
            elif time.monotonic() - moved > _STALL_SECS:
                raise RemoteError(f"{shown(self.url)} stalls", reason=f"nothing has come for {_STALL_SECS:.0f} s")
            self.cancel.wait(pause)
            pause = min(0.2, pause * 1.5)
        # What is quick may have ended between two looks.
        self._come(out)
        self._go_on()

    def _come(self, out: IO[bytes]) -> int:
        """Bytes that have come, from the server and as words; reported, and not more than there may be."""
        said = os.fstat(out.fileno()).st_size
        if said > _MAX_LISTING:
            self._refuse(f"its names take more than {_MAX_LISTING} bytes")
        size = sum(_size(each) for each in self._packs())
        if size > self.max_bytes:
            raise RemoteError(
                f"{shown(self.url)} sends more than {self.max_bytes} bytes",
                reason="a repository may be larger than anybody wants to wait for",
                hint="allow more, if this is what you want: export VZREPRO_DOWNLOAD_GIB=…, or download-gib in "
                "[tool.vzrepro]",
            )
        if size:
            self.report(size, None)
        return size + said

    def _packs(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError):
            yield from (self.folder / "objects/pack").iterdir()

    def _go_on(self) -> None:
        if self.cancel.is_set():
            raise Interrupted(f"interrupted while {shown(self.url)} was being fetched")

    def _refuse(self, reason: str, hint: str | None = None) -> NoReturn:
        raise UsageError(f"what {shown(self.url)} has cannot become a source", reason=reason, hint=hint)


@dataclass(slots=True)
class _Tries:
    """A few attempts (`engine.AttemptPolicy`)."""

    cancel: threading.Event
    backoff: engine.Backoff = field(default_factory=lambda: engine.Backoff(0.5, 5.0))
    begun: int = 0

    def begin(self) -> float:
        """See `AttemptPolicy.begin`."""
        self.begun += 1
        return 0.0

    def grants(self, failure: AttemptFailed, begun: float, pause: float) -> bool:
        """See `AttemptPolicy.grants`."""
        return self.begun < _TRIES and not self.cancel.is_set()

    def sleep(self, secs: float) -> None:
        """See `AttemptPolicy.sleep`."""
        self.cancel.wait(secs)

    def succeed(self) -> None:
        """See `AttemptPolicy.succeed`."""


def _end(process: Any) -> int:
    """The process's exit code; one that is still running is ended."""
    import sh

    if process.is_alive():
        with contextlib.suppress(OSError):
            process.kill_group()
    try:
        process.wait()
    except (sh.ErrorReturnCode, sh.SignalException) as error:
        return int(error.exit_code)
    return 0


def _environment(home: Path) -> dict[str, str]:
    """Nothing of the user's: no configuration, no credentials, no question."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    bundle = {"GIT_SSL_CAINFO": os.environ["SSL_CERT_FILE"]} if os.environ.get("SSL_CERT_FILE") else {}
    return {
        **kept,
        **bundle,
        "HOME": str(home),
        "LC_ALL": "C",
        "GIT_DIR": ".",
        "GIT_ALLOW_PROTOCOL": "file:http:https",
        "GIT_ASKPASS": "false",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
        "GIT_HTTP_LOW_SPEED_TIME": "60",
        "GIT_TERMINAL_PROMPT": "0",
    }


# --- what git says ----------------------------------------------------------------------------------------------------

_HINT = "check the URL and the network; nobody is asked for a password, and no key is used"
_HINTS = (
    (
        re.compile("dubious ownership"),
        "it belongs to another user, and safe.directory does not help, since your configuration is not read: name a "
        "copy that is yours (cp -r), have it served by HTTP, or give it to who runs vzrepro (chown -R)",
    ),
    (
        re.compile("could not read Username|Authentication failed"),
        "the server asks for a password, as many do where nothing is; nobody is asked for one, and no key is used: "
        "check the URL, or name a copy that all may read",
    ),
    (
        re.compile("repository '.*' not found"),
        "check the URL; a repository that a server has as mere files is found after: git update-server-info",
    ),
)
"""What to do about a failure, by what git says of it."""


def _failures(said: str) -> list[str]:
    """The lines in which git tells of failures, without its advice, each once: what the server's side and its own say
    is often the same."""
    lines = [printable(line.rstrip()) for line in said.splitlines() if line.strip()]
    told = [line for line in lines if re.match("fatal|error|remote", line)] or lines
    told = [line for line in told if not _EMPTY_WORDS.search(line)] or told
    found: dict[str, str] = {}
    for line in told:
        found.setdefault(re.sub(r"^(fatal|error): (remote error: )?(git )?(upload-pack: )?", "", line), line)
    return list(found.values())[-8:]


_EMPTY_WORDS = re.compile("askpass|Could not read from remote repository")


_EXECUTABLE, _SYMLINK, _GITLINK = "100755", "120000", "160000"


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of `ls-tree -r -l`."""

    mode: str
    object_id: str
    size: int
    path: str


def _row(line: bytes) -> _Row:
    words, _, path = line.partition(b"\t")
    mode, _kind, object_id, size = words.decode("ascii").split()
    return _Row(mode, object_id, int(size) if size.isdigit() else 0, path.decode("utf-8", "surrogateescape"))


def _blob(blobs: BinaryIO, row: _Row, refuse: Callable[[str], NoReturn]) -> Iterator[bytes]:
    """The content of the next object in the stream, which is to be this row's."""
    head = blobs.readline().decode("ascii", "replace").split()
    if head != [row.object_id, "blob", str(row.size)]:
        refuse(f"git does not give the content of {row.path!a}: {' '.join(head) or 'it ended'}")
    left = row.size
    while left:
        piece = blobs.read(min(left, CHUNK))
        if not piece:
            refuse(f"git ended in the middle of {row.path!a}")
        left -= len(piece)
        yield piece
    blobs.read(1)


def _size(path: Path) -> int:
    """Bytes of a file that git writes: while it works, its temporary ones come and go."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
