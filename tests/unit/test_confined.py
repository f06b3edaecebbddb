"""Recipes in a process of their own: what the kernel refuses it, and that nothing it says is believed."""

from __future__ import annotations

import ast
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vzrepro.base import landlock, seccomp
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.recipe import confined, wire
from vzrepro.recipe import evaluate as plain
from vzrepro.recipe import lock as locks
from vzrepro.recipe.graph import DrvGraph

PROJECT = Path(__file__).parents[2]
PLATFORM = "linux/amd64"

needs_seccomp = pytest.mark.skipif(not seccomp.available(), reason="this kernel confines nobody")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a fork evaluate: pytest-xdist's thread, which only waits, is the other one of a worker."""
    monkeypatch.setattr(confined, "_alone", lambda: True)


# Python's own modules, whatever the guard says, and the guard asleep: the kernel alone is left.
EVIL = """
import json
from vzrepro import text
modules = json.codecs.sys.modules
evaluating = modules["vzrepro.recipe.evaluate"]
evaluating._GUARD._suspended = 1
os = modules["os"]
load = modules["importlib"].import_module
"""

TRIES = {
    "read a file": "open({foreign!r})",
    "read the environment": "open('/proc/self/environ')",
    "list": "os.listdir({outside!r})",
    "write": "open({own!r}, 'w')",
    "append": "open({own!r}, 'a')",
    "create": "os.open({own!r} + '2', os.O_CREAT)",
    "truncate": "os.truncate({own!r}, 0)",
    "rename": "os.rename({own!r}, {own!r} + '2')",
    "remove": "os.unlink({own!r})",
    "link": "os.link({own!r}, {own!r} + '2')",
    "symlink": "os.symlink('x', {own!r} + '2')",
    "mkdir": "os.mkdir({own!r} + '2')",
    "mkfifo": "os.mkfifo({own!r} + '2')",
    "chmod": "os.chmod({own!r}, 0o777)",
    "utime": "os.utime({own!r})",
    "setxattr": "os.setxattr({own!r}, 'user.x', b'')",
    "chdir": "os.chdir('/')",
    "fork": "os.fork()",
    "execute": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "start": "load('subprocess').run(['true'])",
    "thread": "load('_thread').start_new_thread(print, ())",
    "connect": "load('socket').socket()",
    "pair": "load('socket').socketpair()",
    "signal": "os.kill({parent}, 0)",
    "be signalled": "load('fcntl').fcntl(1, 8, {parent})",
    "priority": "os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
    "terminal": "load('fcntl').ioctl(1, 0x5412, b'x')",
    "memory": "os.memfd_create('m')",
}


def workspace(path: Path, source: str) -> Path:
    (path / "recipes").mkdir(parents=True)
    (path / "recipes/a.py").write_text(source)
    return path


def evaluate(root: Path) -> DrvGraph:
    return confined.evaluate(root, locks.Lock(), PLATFORM)


def said(graph: DrvGraph) -> str:
    """The text of the only `text` of a workspace."""
    [node] = graph.nodes.values()
    data = node.tree[""]
    assert isinstance(data, bytes)
    return data.decode()


def test_what_comes_back_is_what_an_evaluation_here_gives() -> None:
    lock = locks.load(PROJECT / "lock.toml")
    assert confined.evaluate(PROJECT, lock, PLATFORM) == plain.evaluate(PROJECT, lock, PLATFORM)
    lenient = [each(PROJECT, locks.Lock(), PLATFORM, lenient=True) for each in (confined.evaluate, plain.evaluate)]
    assert [want.request for want in lenient[0].wants] == [want.request for want in lenient[1].wants]
    assert lenient[0] == lenient[1]


@needs_seccomp
@pytest.mark.parametrize("with_landlock", [True, False])
def test_the_kernel_refuses_what_the_guard_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_landlock: bool
) -> None:
    if not with_landlock:
        monkeypatch.setattr(landlock, "version", lambda: 0)
    elif not landlock.version():
        pytest.skip("this kernel has no Landlock")
    monkeypatch.setenv("SECRET", "of this process")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    root = workspace(tmp_path / "w", "")
    own = root / "recipes/own"
    own.write_text("own")
    facts = {"foreign": str(outside / "file"), "outside": str(outside), "own": str(own), "parent": os.getpid()}
    lines = [f"    {name!r}: lambda: {call.format(**facts)}," for name, call in TRIES.items()]
    source = f"""{EVIL}
TRIES = {{
{chr(10).join(lines)}
}}
found = {{"environment": sorted(os.environ), "own file": open({str(own)!r}).read()}}
for name, call in TRIES.items():
    try:
        call()
        found[name] = "done"
    except PermissionError as error:
        found[name] = "refused"
    except RuntimeError as error:
        found[name] = str(error)
text("found", repr(found))
"""
    (root / "recipes/a.py").write_text(source)
    found = ast.literal_eval(said(evaluate(root)))
    expected = dict.fromkeys(TRIES, "refused") | {"thread": "can't start new thread"}
    if not with_landlock:
        expected |= dict.fromkeys(("read a file", "read the environment", "list"), "done")
    assert found == {**expected, "environment": [], "own file": "own"}
    assert own.read_text() == "own"
    assert sorted(path.name for path in own.parent.iterdir()) == ["a.py", "own"]


@needs_seccomp
def test_what_a_recipe_changes_in_vzrepro_stays_in_its_process(tmp_path: Path) -> None:
    source = EVIL + "evaluating.evaluate = modules['vzrepro.base.model'].store_path = None\ntext('t', 'x')\n"
    assert said(evaluate(workspace(tmp_path, source))) == "x"
    assert plain.evaluate is not None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "recipes/a.py:1: ZeroDivisionError: division by zero"),
        ("exit()", "recipes/a.py:1: SystemExit: a recipe may not end the evaluation"),
        ("import os", "recipes/a.py:1: a recipe may not import os: it reads the environment and the file system"),
    ],
)
def test_errors_are_those_of_an_evaluation_here(tmp_path: Path, source: str, message: str) -> None:
    root = workspace(tmp_path, source)
    errors = []
    for each in (evaluate, lambda root: plain.evaluate(root, locks.Lock(), PLATFORM)):
        with pytest.raises(UsageError) as caught:
            each(root)
        errors.append((type(caught.value), caught.value.message, caught.value.reason, caught.value.hint))
    assert errors[0] == errors[1]
    assert errors[0][1] == message


@needs_seccomp
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os._exit(3)", "it ended with exit code 3"),
        ("for fd in range(3, 64):\n    try: os.write(fd, b'junk')\n    except OSError: pass", "Extra data"),
    ],
)
def test_a_process_that_says_nothing_sound_is_an_error(tmp_path: Path, end: str, reason: str) -> None:
    with pytest.raises(VzreproError) as error:
        evaluate(workspace(tmp_path, EVIL + end))
    assert reason in str(error.value.reason) or "Expecting value" in str(error.value.reason)


@needs_seccomp
def test_beside_other_threads_a_python_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def fork() -> int:
        raise AssertionError("threads and a fork")

    monkeypatch.setattr(os, "fork", fork)
    source = EVIL + "text('t', repr([sorted(os.environ), os.getppid()]))"
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert said(evaluate(workspace(tmp_path, source))) == repr([[], os.getpid()])
    finally:
        over.set()
        thread.join()


def test_where_the_kernel_cannot_recipes_are_evaluated_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = workspace(tmp_path, EVIL + "text('t', str(os.getpid()))")

    def refused(_root: Path) -> None:
        raise OSError(errno.EPERM, "by a container's engine")

    with monkeypatch.context() as patch:
        patch.setattr(confined, "_confine", refused)
        assert said(evaluate(root)) == str(os.getpid())
    monkeypatch.setattr(seccomp, "available", lambda: False)
    assert said(evaluate(root)) == str(os.getpid())
    assert "not confined" in confined.describe()


def test_what_confines_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "available", lambda: True)
    monkeypatch.setattr(landlock, "version", lambda: 4)
    assert confined.describe() == "confined by seccomp and Landlock 4"
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert "without Landlock" in confined.describe()


# --- what is not believed ------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> bytes:
    """The bytes of a graph of a text that two others are inputs of, otherwise."""
    document = json.loads(wire.dump(plain.evaluate(workspace(tmp_path, SOUND), locks.Lock(), PLATFORM, lenient=True)))
    change(document)
    return json.dumps(document).encode()


SOUND = """
from vzrepro import local, text, url_source
url_source("u", "https://host/u", sha256="0" * 64)
local("a.py")
"""


def _at(kind: str, key: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Set something of the download, or of the local files."""

    def change(document: dict[str, Any]) -> None:
        [node] = [each for each in document["all"] if each["drv"][1] == kind]
        node[key] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.clear(),
        lambda document: document.update(nodes=[7]),
        lambda document: document.update(nodes=[]),
        lambda document: document.update(reads=[1]),
        lambda document: document.update(all=[{}]),
        lambda document: document["wants"].append(["wish", "n", "p", {}, False]),
        lambda document: document.update(error=[True, 1, None, None]),
        _at("local", "tree", {"a.py": "/etc/passwd"}),
        _at("local", "tree", {"a.py": "recipes/../../../etc/passwd"}),
        _at("local", "tree", {"../a.py": ["eA=="]}),
        _at("local", "tree", {"a.py": ["!"]}),
        _at("local", "tree", {"a.py": 1}),
        _at("local", "target", "../t"),
        _at("local", "kind", "wish"),
        _at("local", "limits", [True, None, None]),
        _at("local", "linked", [1]),
        _at("local", "checkout", ["u", "c", "0", 1, 1]),
        _at("fetch", "files", {"/x": ["u", "0" * 64, 1, []]}),
        _at("fetch", "files", {"": ["u", "0", 1, []]}),
        _at("fetch", "files", {"": ["u", "0" * 64, "1", []]}),
    ],
)
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = changed(change, tmp_path)
    with pytest.raises(VzreproError):
        wire.load(data, tmp_path)


def test_an_answer_s_hashes_are_those_of_what_it_holds(tmp_path: Path) -> None:
    honest = plain.evaluate(workspace(tmp_path / "honest", SOUND), locks.Lock(), PLATFORM, lenient=True)
    found = wire.load(changed(_at("local", "drv", _named(honest, "another")), tmp_path / "w"), tmp_path / "w")
    [node] = [node for node in found.nodes.values() if node.drv.builder == "local"]
    node.check()
    assert node.path.name == "another"
    assert node.drv_hash not in honest.nodes


def _named(graph: DrvGraph, name: str) -> list[object]:
    """The local files' derivation as it is sent, by another name."""
    [drv] = [each["drv"] for each in json.loads(wire.dump(graph))["all"] if each["drv"][1] == "local"]
    return [name, *drv[1:]]
