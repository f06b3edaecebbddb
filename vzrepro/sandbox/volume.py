"""A job's directories in a volume on the engine's own disk, for an engine that does not mount ours.

The volume belongs to a container, the keeper, and goes with it; so nothing but containers has to be swept. While a
build lasts, the keeper runs the image's shell, which protects the volume from whoever prunes, and answers what only
somebody there can: how full the disk is, what the build has taken of it, what is in /out. What goes in and comes out
goes through `docker cp`, which needs nothing of the image.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from vzrepro.base.errors import VzreproError
from vzrepro.sandbox import archive, engine
from vzrepro.sandbox.job import Job
from vzrepro.sandbox.places import VolumeNote, forget_volume, note_volume, volume_of
from vzrepro.sandbox.staging import write_profile

_AT = "/volume"  # in the keeper
_ENTRY_BYTES = 4096  # as `disk.usage` counts
_KINDS = tuple("-dlpscb")  # of ls -l
_PIECE = 1 << 16
_TICK_MS = 100
# Each answer ends with a line of a dot and the exit code.
_KEEPER = f"""cd {_AT}; while read -r word; do
case $word in
free) stat -f -c "%f %S" . ;;
used) du -s -B 1 build out; du -s --inodes build out ;;
list) ls -A -l -n -q -R ./out ;;
esac
echo ". $?"; done"""


@dataclass(slots=True)
class BuildVolume:
    """The way of a job whose directories are sent to the engine and fetched from it."""

    job: Job
    _name: str = ""
    _client: Any = None
    _words: int = -1
    _answers: int = -1
    _complaints: Any = field(default_factory=tempfile.TemporaryFile)
    _rest: bytes = b""

    def fill(self, go_on: Callable[[], None]) -> None:
        """Make the volume, and send what the sandbox is to show. Raises VzreproError, and what `go_on` raises."""
        self._name = engine.new_name()
        self._start()
        for _line in self._ask("free", go_on):  # it has the volume once it answers
            pass
        _, root, _ = engine.docker("inspect", "--format", "{{range .Mounts}}{{.Source}}{{end}}", self._name)
        note_volume(self.job, VolumeNote(self._name, PurePosixPath(root.strip())))
        write_profile(self.job)
        self._send(go_on)

    def free(self, go_on: Callable[[], None]) -> int:
        """Bytes that the engine's disk has left."""
        blocks, size = self._numbers("free", 2, go_on)
        return blocks * size

    def used(self, _enough: int, go_on: Callable[[], None]) -> int:
        """Bytes in /build and /out, each thing being one of 4 KiB at least."""
        sizes = self._numbers("used", 4, go_on)
        return max(sum(sizes[:2]), _ENTRY_BYTES * sum(sizes[2:]))

    def take(self, check: Callable[[int], None]) -> None:
        """Fetch /out to `job.out`. Raises VzreproError, and what `check`, which gets the bytes until then, raises."""
        count = self._fetch(check)
        # The engine leaves out what its archive cannot hold, sockets, and what it cannot read, and says nothing.
        found = 0
        for line in self._ask("list", lambda: check(0)):
            found += line.startswith(_KINDS)
            if line.startswith("s"):
                raise VzreproError(
                    f"{self.job.label} leaves a socket in /out, which cannot be part of a store object",
                    reason="it is a socket, a device or a fifo; only files, directories and symbolic links can",
                )
        if found != count:
            raise self._incomplete(f"{count} files and directories came, of {found}")

    def end(self, *, keep: bool) -> None:
        """Remove the volume, unless it is to be kept for `vzrepro shell`'s command; whatever is going on there."""
        self._hang_up()
        try:
            if not keep and self._name:
                engine.remove(self._name, self._client)
                forget_volume(self.job)
        finally:
            self._complaints.close()

    # --- the keeper

    def _start(self) -> None:
        words_end, self._words = os.pipe()
        self._answers, answers_end = os.pipe()
        owner = "vzrepro.kept" if self.job.keep_failed else "vzrepro.host"
        try:
            with os.fdopen(words_end, "rb") as words:
                self._client = engine.start(
                    [
                        *("run", "--interactive", "--name", self._name, "--label", f"{owner}={engine.host_name()}"),
                        *("--label", f"vzrepro.volume-of={self.job.label}"),
                        *("--log-driver", "none", "--pull", "never", "--platform", self.job.platform),
                        *("--network", "none", "--read-only", "--user", "0:0", "--pids-limit", "64"),
                        # It looks into what builders close, and changes nothing.
                        *("--cap-drop", "ALL", "--cap-add", "DAC_READ_SEARCH"),
                        *("--security-opt", "no-new-privileges"),
                        *("--mount", f"type=volume,dst={_AT},volume-label={owner}={engine.host_name()}"),
                        *("--entrypoint", "env", self.job.image),
                        *("-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "sh", "-c", _KEEPER),
                    ],
                    words,
                    answers_end,
                    self._complaints,
                )
        finally:
            os.close(answers_end)

    def _ask(self, word: str, go_on: Callable[[], None]) -> Iterator[str]:
        """The lines of an answer. Raises VzreproError when there is no more of it."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._words, f"{word}\n".encode())
        while True:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                if line.startswith(b". "):
                    return
                yield line.decode(errors="replace")
            _await(self._answers, select.POLLIN, go_on)
            chunk = os.read(self._answers, _PIECE)
            if not chunk:
                raise self._lost()
            self._rest += chunk

    def _numbers(self, word: str, count: int, go_on: Callable[[], None]) -> list[int]:
        answers = [each for line in self._ask(word, go_on) for each in line.split() if each.isdecimal()]
        if len(answers) != count:
            raise VzreproError(
                f"the image of {self.job.label} does not say what a build takes of the disk",
                reason=_text(self._complaints) or None,
                hint="have GNU coreutils in it: the container engine mounts nothing from here (docs/sandbox.md)",
            )
        return [int(each) for each in answers]

    def _hang_up(self) -> None:
        """Let the keeper end."""
        for fd in (self._words, self._answers):
            if fd >= 0:
                os.close(fd)
        self._words = self._answers = -1

    def _lost(self) -> VzreproError:
        engine.wait(self._client)
        return engine.trouble(_text(self._complaints))

    # --- archives

    def _send(self, go_on: Callable[[], None]) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        with tempfile.TemporaryFile() as complaints, Path(os.devnull).open("wb") as nothing:
            with os.fdopen(write_end, "wb", buffering=0) as raw:
                with os.fdopen(read_end, "rb") as stdin:
                    client = engine.start(["cp", "-", f"{self._name}:{_AT}"], stdin, nothing.fileno(), complaints)
                with _ended(client), contextlib.suppress(BrokenPipeError):  # it says why
                    archive.pack(self.job, cast(BinaryIO, _Writer(raw.fileno(), go_on)))
                    raw.close()
                    while client.is_alive():
                        go_on()
                        time.sleep(0.02)
            if engine.wait(client) != 0:
                raise engine.trouble(_text(complaints))

    def _fetch(self, check: Callable[[int], None]) -> int:
        read_end, write_end = os.pipe()
        with (
            tempfile.TemporaryFile() as complaints,
            Path(os.devnull).open("rb") as nothing,
            os.fdopen(read_end, "rb", buffering=0),
        ):
            try:
                client = engine.start(["cp", f"{self._name}:{_AT}/out", "-"], nothing, write_end, complaints)
            finally:
                os.close(write_end)
            count, broken = 0, ""
            with _ended(client):
                reader = _Reader(read_end, check)
                try:
                    count = archive.unpack(cast(BinaryIO, reader), self.job.out, reader.note)
                except tarfile.TarError as error:
                    broken = str(error)
                while reader.read(_PIECE):  # what follows the archive's end
                    pass
            if engine.wait(client) != 0:
                raise engine.trouble(_text(complaints))
            if broken:
                raise self._incomplete(broken)
            return count

    def _incomplete(self, why: str) -> VzreproError:
        return VzreproError(
            f"what {self.job.label} left in /out did not come whole from the container engine",
            reason=why,
            hint="run the same command again",
        )


def discard_volume(job: Job) -> None:
    """Remove the job's volume, if it still has one."""
    note = volume_of(job)
    if note is not None:
        engine.docker("rm", "--force", "--volumes", note.container, checked=False)
        forget_volume(job)


@contextlib.contextmanager
def _ended(client: Any) -> Iterator[None]:
    """End the client when the block raises."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            client.kill_group()
        engine.wait(client)
        raise


def _await(fd: int, event: int, go_on: Callable[[], None]) -> None:
    poll = select.poll()
    poll.register(fd, event)
    go_on()
    while not poll.poll(_TICK_MS):
        go_on()


class _Writer(io.RawIOBase):
    """Writes to a pipe that may be full for a while."""

    def __init__(self, fd: int, go_on: Callable[[], None]) -> None:
        self._fd, self._go_on = fd, go_on

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            _await(self._fd, select.POLLOUT, self._go_on)
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._fd, view) :]
        return size


class _Reader(io.RawIOBase):
    """Reads from a pipe that may be empty for a while; `note` says how much of a result has come."""

    def __init__(self, fd: int, check: Callable[[int], None]) -> None:
        self._fd, self._check = fd, check
        self._size = 0

    def note(self, size: int) -> None:
        self._size = size
        self._check(size)

    def read(self, size: int = -1) -> bytes:
        _await(self._fd, select.POLLIN, lambda: self._check(self._size))
        return os.read(self._fd, size if size >= 0 else _PIECE)


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()
