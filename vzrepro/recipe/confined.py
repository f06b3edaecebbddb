"""Recipes evaluated by a child process that the kernel confines: `evaluate.evaluate`, for recipes of anybody.

The child reads the workspace, Python and vzrepro, and writes its answer; it opens no socket, starts nothing, signals
nobody, and has no environment. Where the kernel cannot do that, recipes are evaluated in this process, under the guard.
docs/recipes.md says what that guarantees.

The child is a fork, which costs a seventh of a new Python. Only a process with one thread can be forked safely: from
any other a Python is started.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import vzrepro
from vzrepro.base import landlock, seccomp, syscalls
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.recipe import evaluate as plain
from vzrepro.recipe import wire
from vzrepro.recipe.graph import DrvGraph
from vzrepro.recipe.lock import Lock

_MOST_BYTES = 1 << 30  # of an answer; a node is some hundred
_PR_SET_PDEATHSIG = 1
_CONFINED, _NOT_CONFINED = b"+", b"-"

_CALLS = """
    access arch_prctl brk clock_getres clock_gettime close exit exit_group faccessat faccessat2 fadvise64 fstat fstatfs
    futex getcwd getdents64 getegid geteuid getgid getpid getppid getrandom getrusage gettid gettimeofday getuid lseek
    lstat madvise membarrier mmap mprotect mremap munmap newfstatat pread64 read readlink readlinkat readv
    restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn sched_getaffinity sched_yield set_robust_list
    sigaltstack stat statfs statx sysinfo time uname write writev
"""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_SETS_OWNER = 8  # F_SETOWN, F_SETSIG, F_SETOWN_EX: who is signalled about a file
_RULES = (
    *(seccomp.Rule(call, seccomp.ALLOW) for call in _CALLS.split()),
    seccomp.Rule("open", seccomp.refuse(), if_any=(1, _WRITES)),
    seccomp.Rule("openat", seccomp.refuse(), if_any=(2, _WRITES)),
    seccomp.Rule("fcntl", seccomp.refuse(), if_any=(1, _SETS_OWNER)),
)


@dataclass(frozen=True, slots=True)
class _Asked:
    root: Path
    lock: Lock
    platform: str
    lenient: bool

    def evaluate(self) -> DrvGraph:
        return plain.evaluate(self.root, self.lock, self.platform, lenient=self.lenient)


def evaluate(root: Path, lock: Lock, platform: str, *, lenient: bool = False) -> DrvGraph:
    """As `vzrepro.recipe.evaluate.evaluate`, in a process of its own. Raises VzreproError, too, when that one fails."""
    asked = _Asked(root.resolve(), lock, platform, lenient)
    if not seccomp.available():
        return asked.evaluate()
    answer = _forked(asked) if _alone() else _started(asked)
    if answer[:1] == _NOT_CONFINED:
        return asked.evaluate()
    return wire.load(answer[1:], asked.root)


def load_modules() -> None:
    """Import what an evaluation may need, while it can be read."""
    for name in ("ctypes", *sorted(plain.PURE_MODULES), "vzrepro.recipes"):
        importlib.import_module(name)


def describe() -> str:
    """What confines the evaluation here, for a person."""
    if not seccomp.available():
        return "not confined here: the kernel has no seccomp filters (docs/recipes.md)"
    if not (version := landlock.version()):
        return "confined by seccomp; without Landlock, recipes can read foreign files (docs/recipes.md)"
    return f"confined by seccomp and Landlock {version}"


def _alone() -> bool:
    """Whether this process has one thread, of C libraries' threads, too."""
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir()) == 1
    except OSError:
        return False


def _forked(asked: _Asked) -> bytes:
    ours, theirs = os.pipe()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()  # else the child would print it, too
    if (pid := os.fork()) == 0:
        _serve(theirs, asked)
    os.close(theirs)

    def end() -> str:
        os.kill(pid, signal.SIGKILL)
        return _words(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    return _answer(ours, end)


def _started(asked: _Asked) -> bytes:
    ours, theirs = os.pipe()
    environment = {
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs)],
            env=environment,
            stdin=subprocess.PIPE,
            pass_fds=(theirs,),
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)

    def end() -> str:
        process.kill()
        return _words(process.wait())

    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(pickle.dumps(asked))
    return _answer(ours, end)


def _answer(pipe: int, end: Callable[[], str]) -> bytes:
    """What the child says; it is ended, whatever happens. Raises VzreproError when it says nothing."""
    with os.fdopen(pipe, "rb") as file:
        try:
            said = file.read(_MOST_BYTES + 1)
        finally:
            how = end()
    if len(said) > _MOST_BYTES or (len(said) < 2 and said != _NOT_CONFINED):
        what = how if len(said) < 2 else f"it answered with more than {_MOST_BYTES >> 20} MiB"
        raise VzreproError("the recipes could not be evaluated: their process failed", reason=what)
    return said


def _words(code: int) -> str:
    return f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"


# --- the child -----------------------------------------------------------------------------------------------------


def _serve(pipe: int, asked: _Asked) -> NoReturn:
    """Evaluate, say what came of it, and end."""
    code = 1
    try:
        _prepare(pipe)
        try:
            _confine(asked.root)
        except OSError:
            os.write(pipe, _NOT_CONFINED)
        else:
            os.write(pipe, _CONFINED)  # said before a recipe could
            _write(pipe, _evaluated(asked))
        code = 0
    finally:
        os._exit(code)


def _evaluated(asked: _Asked) -> bytes:
    try:
        answer = wire.dump(asked.evaluate())
    except VzreproError as error:
        answer = wire.dump_error(error)
    except OSError as error:
        what = f"{error.filename or 'a file'} cannot be read while recipes are evaluated"
        answer = wire.dump_error(UsageError(what, reason=error.strerror))
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # what a recipe printed is read by nobody
            stream.flush()
    return answer


def _write(pipe: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _prepare(pipe: int) -> None:
    """Give up all that the process has but its output, the pipe, and what is in memory."""
    syscalls.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with contextlib.suppress(FileNotFoundError):  # without /proc this is a Python of its own, which was given nothing
        for each in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
            if each > 2 and each != pipe:
                with contextlib.suppress(OSError):  # the directory's own
                    os.close(each)
    load_modules()
    gc.freeze()  # what is left of the parent's is not ended here: it may think that it has files open


def _confine(root: Path) -> None:
    if landlock.version():
        landlock.read_only([root, Path(os.__file__).parent, Path(vzrepro.__file__).parent])
    seccomp.install(_RULES, seccomp.refuse())


if __name__ == "__main__":
    _serve(int(sys.argv[1]), pickle.load(sys.stdin.buffer))
