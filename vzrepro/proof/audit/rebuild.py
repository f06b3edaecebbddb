"""One rebuild: a node's own sandbox job, with what the audit varies and holds, run beside the store and hashed.

The job is the maker's, on the registered inputs; nothing is taken from caches, and no object and no table of the
store is written. A rebuild that reproduces is hashed where it lies. One that differs is copied into canonical form, so
that it can be compared with the registered output before it goes away.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import math
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vzrepro import nar, sandbox
from vzrepro.base import disk, events
from vzrepro.base.errors import BuildFailed, HashMismatch, Interrupted, RemoteError, TimedOut, UsageError, VzreproError
from vzrepro.base.model import DrvHash, ObjectInfo, StorePath
from vzrepro.base.words import plural
from vzrepro.proof.audit import changes, observed
from vzrepro.proof.audit.axes import PROCESS_IDS, Axis
from vzrepro.proof.audit.blame import Ending
from vzrepro.proof.audit.changes import World
from vzrepro.proof.audit.observed import Observed
from vzrepro.proof.audit.records import RebuildRequest, Record
from vzrepro.realize.realizer import Realizer
from vzrepro.recipe.graph import Node

LOG_LINES = 30
"""Lines of a rebuild's output that its record repeats."""

_PATIENCE = 2
"""A rebuild may take so many times the recipe's limit: some axes make it slower, and it is not what is tested."""

_IMAGE_SECS = 60.0  # so long an image that was in the container engine is taken to be there still

_BALLAST = 128
# Of what comes out the same by chance it would not be seen that it leaks: an engine's process ids are a few numbers,
# and freed inode numbers are given out again. So every attempt gets others.
_FIRST_PID, _PIDS_APART = 40, 20
_FULL = "No space left on device"
_LEAST_FREE = 64 << 20
_TOO_LITTLE_MEMORY = ("ran out of memory", "most likely for its memory limit")  # as `sandbox.run` says it

Compare = Callable[[Path, Path, Observed | None, Observed | None], str | None]
"""Gets a rebuilt output that differs, in canonical form, a directory for work, and what was seen inside the sandbox and
(of another machine's rebuild) is seen there with nothing varied; returns an explanation's id."""

_IN_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Rebuilder:
    """What rebuilds have in common. `axes` are all there are, by name."""

    realizer: Realizer
    world: World
    axes: Mapping[str, Axis]
    _loaded: dict[DrvHash, float] = field(default_factory=dict)
    _sound: set[StorePath] = field(default_factory=set)
    _hashing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def jobs(self) -> int:
        """How many rebuilds run at once."""
        return self.realizer.config.build_jobs()

    @property
    def tools(self) -> str:
        """What looks from inside; empty when nothing does."""
        return "" if self.world.tools is None else self.world.tools.name

    def prepare(self, nodes: Sequence[Node]) -> Mapping[StorePath, ObjectInfo]:
        """Have every node that is to be rebuilt, and its inputs, valid in the store."""
        realizer = self.realizer
        sandbox.check()
        sandbox.sweep()
        needed: dict[StorePath, Node] = {}
        for node in nodes:
            for each in (*realizer.graph.inputs(node), node):
                needed.setdefault(each.path, each)
        missing = needed.keys() - realizer.inventory.have(list(needed)).keys()
        if missing:
            names = ", ".join(sorted(needed[path].target for path in missing)[:5])
            message = (
                f"{len(missing)} of {plural(len(needed), 'object')} must be realized first, which is no part of the "
                f"audit: {names}{' …' if len(missing) > 5 else ''}"
            )
            realizer.report(events.Notice("info", message))
        realizer.realize(list(needed.values()))
        return realizer.store.query_many(list(needed))

    def excuse(self, axis: Axis, node: Node) -> str | None:
        """Why the node cannot have the axis here; None when it can."""
        return axis.unavailable(self.world, self.job(node, self.realizer.store.private / "tmp" / "none"))

    def verify(self, node: Node, infos: Sequence[ObjectInfo]) -> None:
        """Before the node is blamed: these objects are what is registered. Raises HashMismatch."""
        with self._hashing:
            for info in infos:
                if info.path in self._sound:
                    continue
                if self.realizer.stop.is_set():
                    raise Interrupted(f"interrupted while the inputs of {node.target} were being hashed")
                # Hashed only: the store's own check minds hard links, and a sandbox that runs has some.
                if nar.nar_hash(self.realizer.store.location(info.path))[0] != info.nar_hash:
                    raise HashMismatch(
                        f"{info.path.base} is corrupt, so nothing can be said of {node.target}",
                        reason="its files are not those that are registered",
                        hint=f"vzrepro store repair {info.path.base}, then the same command again",
                    )
                self._sound.add(info.path)

    def job(self, node: Node, scratch: Path, asked: RebuildRequest | None = None) -> sandbox.Job:
        """The node's job with what is asked of it; `scratch` need not exist."""
        pid = None
        if asked is not None and PROCESS_IDS not in (*asked.axes, *asked.held):
            pid = _FIRST_PID + _PIDS_APART * asked.attempt
        made = self.realizer.maker.job(node, self.realizer.graph.input_paths(node), scratch)
        job = changes.baseline(made, self.world, pid)
        if job.timeout_secs is not None:
            job = replace(job, timeout_secs=job.timeout_secs * _PATIENCE)
        if asked is not None:
            for name in asked.held:
                hold = self.axes[name].hold
                assert hold is not None
                job = hold(job, self.world)
            for name in asked.axes:
                vary = self.axes[name].vary
                assert vary is not None
                job = vary(job, self.world, asked.round)
        return job

    def build(
        self,
        node: Node,
        asked: RebuildRequest,
        *,
        say: Callable[[str], None],
        keep_log: Callable[[str, Path], None],
        compare: Compare,
    ) -> Record:
        """Make the rebuild and say what came of it. `say` gets the builder's lines, `keep_log` the
        rebuild's id and its whole log.

        A toolchain image is written again from its .debs, a download fetched again: that is what `--deep` does.

        Raises Interrupted, and VzreproError when no rebuild can work here now: no space, no container engine.
        """
        sandboxed = node.drv.builder == "sandbox"
        if sandboxed:
            self._load_image(node)
        clock = _Clock()
        output = _Output(say)
        nar_hash = nar_size = explanation = None
        with (
            self.realizer.store.scratch(node.target, stop=self.realizer.stop) as scratch,
            (
                self._sandbox(node, asked, scratch, output)
                if sandboxed
                else contextlib.nullcontext(self._again(node, scratch / "tree"))
            ) as made,
        ):
            ending, reason = made.ending, made.reason
            if ending is Ending.BUILT and asked.builds:
                try:
                    found, nar_size = nar.nar_hash(made.tree, progress=made.go_on)
                except Interrupted:
                    raise
                except TimedOut as error:
                    ending, reason = Ending.LOST, error.message
                except VzreproError as error:  # a socket or a device was left in it
                    ending, reason = Ending.FAILED, str(error)
                else:
                    nar_hash = found.hex
            milliseconds, finished = clock.milliseconds(), clock.now()
            if nar_hash is not None and nar_hash != asked.registered:
                explanation = _compared(made.tree, scratch, output.observed, compare)
            if made.log is not None and asked.builds and nar_hash != asked.registered:
                keep_log(asked.id, made.log)
        return Record(
            asked=asked,
            ending=ending,
            nar_hash=nar_hash,
            nar_size=nar_size,
            started=clock.started,
            finished=finished,
            milliseconds=milliseconds,
            reason=reason,
            observed=output.observed,
            log=tuple(output.tail),
            explanation=explanation,
            tools=self.tools if sandboxed else "",
        )

    def _load_image(self, node: Node) -> None:
        """Have the node's image in the engine. It is not asked all the time: that would be much of a short build."""
        assert node.drv.image is not None
        now = time.monotonic()
        if now >= self._loaded.get(node.drv.image, -math.inf) + _IMAGE_SECS:
            self.realizer.maker.load_image(node, self.realizer.graph.input_paths(node))
            self._loaded[node.drv.image] = now

    @contextlib.contextmanager
    def _sandbox(self, node: Node, asked: RebuildRequest, scratch: Path, output: _Output) -> Iterator[_Made]:
        """The node's job run in the sandbox; removed again afterwards."""
        _occupy_inodes(scratch / "ballast")
        job = replace(self.job(node, scratch / "sandbox", asked), log=scratch / "log")
        if not asked.builds:
            job = replace(job, command=("sh", "-c", ":"))
        job.scratch.mkdir(mode=0o700)
        try:
            ending, reason, go_on = self._run(job, asked, output)
            yield _Made(ending, reason, job.out, job.log, go_on)
        finally:
            with contextlib.suppress(Interrupted, TimedOut):  # the rest goes with the scratch directory
                sandbox.discard(job, stop=self.realizer.stop)

    def _run(
        self, job: sandbox.Job, asked: RebuildRequest, output: _Output
    ) -> tuple[Ending, str | None, Callable[[int], None] | None]:
        try:
            limits = sandbox.run(job, on_line=output.line, stop=self.realizer.stop)
        except BuildFailed as error:
            if any(_FULL in line for line in output.tail):
                self._check_space()
                return Ending.LOST, "a file system of the sandbox was too small for the build", None
            if (asked.axes or asked.held) and any(words in error.message for words in _TOO_LITTLE_MEMORY):
                return Ending.LOST, error.message, None
            return Ending.FAILED, error.message, None
        except TimedOut as error:
            return Ending.LOST, error.message, None
        except Interrupted:
            raise
        except VzreproError as error:
            self._loaded.clear()
            self._check_space()  # a full disk is met in many places, the log among them, and said in one way
            if not (asked.axes or asked.held):
                raise
            sandbox.check()  # if the engine is gone, it says so better
            return Ending.LOST, error.in_a_line, None
        return Ending.BUILT, None, self._reading(limits)

    def _reading(self, limits: sandbox.RunLimits) -> Callable[[int], None]:
        """The limits of a result that is being read: what ended by itself is read for a few seconds after Ctrl-C."""
        patience = disk.until_stopped(self.realizer.stop, None)

        def go_on(size: int) -> None:
            try:
                limits.check(size)
            except Interrupted:
                patience()

        return go_on

    def _check_space(self) -> None:
        root = self.realizer.store.root
        if shutil.disk_usage(root).free < _LEAST_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))

    # --- what is made without a sandbox

    def _again(self, node: Node, tree: Path) -> _Made:
        """A toolchain image or a download made again."""
        try:
            self.realizer.maker.make_again(node, self.realizer.graph.input_paths(node), tree)
        except RemoteError as error:
            return _Made(Ending.LOST, error.message, tree)
        except (HashMismatch, UsageError) as error:  # other bytes than were pinned; an unsound package
            return _Made(Ending.FAILED, error.message, tree)
        return _Made(Ending.BUILT, None, tree)


@dataclass(frozen=True, slots=True)
class _Made:
    """What a rebuild came to: its output is at `tree`, if there is one, the sandbox's log at `log`;
    `go_on` raises once a limit of the sandbox is reached."""

    ending: Ending
    reason: str | None
    tree: Path
    log: Path | None = None
    go_on: Callable[[int], None] | None = None


class _Output:
    """The builder's lines: what the sandbox says of itself is taken out, the last ones are kept."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.observed: Observed | None = None
        self.tail: deque[str] = deque(maxlen=LOG_LINES)
        self._say = say

    def line(self, text: str) -> None:
        if self.observed is None and (seen := observed.parse(text)) is not None:
            self.observed = seen
            return
        self.tail.append(text)
        self._say(text)


class _Clock:
    """When something began, and how long it has taken."""

    def __init__(self) -> None:
        self.started = self.now()
        self._begun = time.monotonic_ns()

    @staticmethod
    def now() -> str:
        """The time of day, RFC 3339 in UTC, to the second."""
        return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def milliseconds(self) -> int:
        return (time.monotonic_ns() - self._begun) // 1_000_000


@contextlib.contextmanager
def memory_directory() -> Iterator[Path | None]:
    """A private directory in the host's memory, for `World.scratch_shm`; None where there is no such file system.

    What an audit that was killed has left there is removed by the next one.
    """
    if not os.access(_IN_MEMORY, os.W_OK | os.X_OK):
        yield None
        return
    for left in _IN_MEMORY.glob("vzrepro-audit-*"):
        with contextlib.suppress(OSError):  # another user's
            disk.remove_unlocked(left)
    while True:  # another audit may remove it before it is locked
        place = Path(tempfile.mkdtemp(prefix="vzrepro-audit-", dir=_IN_MEMORY))
        with contextlib.suppress(FileNotFoundError):
            fd = disk.try_lock(place, create=False)
            if fd is not None:
                break
    try:
        yield place
    finally:
        disk.remove_tree(place)
        os.close(fd)


def _compared(out: Path, scratch: Path, seen: Observed | None, compare: Compare) -> str | None:
    tree = scratch / "canonical"
    nar.canonical_copy(out, tree)
    return compare(tree, scratch, seen, None)


def _occupy_inodes(ballast: Path) -> None:
    """Take the inode numbers that the file system would give next, which an earlier build may have had."""
    ballast.mkdir()
    with contextlib.suppress(OSError):
        for number in range(_BALLAST):
            os.close(os.open(f"{ballast}/{number}", os.O_CREAT | os.O_WRONLY))
