"""How it is found out whether the engine mounts what is here. The engine is a shell script."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vzrepro import sandbox
from vzrepro.base import disk
from vzrepro.base.errors import VzreproError
from vzrepro.sandbox import sharing

INFO = {"ServerVersion": "28", "Driver": "overlay2", "CgroupVersion": "2", "NCPU": 2, "MemTotal": 8 << 30}
# Looks through the mount that was asked for, as an engine that sees all files.
SEES = """
case $1 in
    info) cat {info} ;;
    create) echo "$@" | sed 's/.*src=\\([^,]*\\),.*/\\1/' > {place}/mount ;;
    cp) name=${{2##*/}}; echo "$name"; cat "$(cat {place}/mount)/$name" ;;
esac
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a script as the docker client; returns the file in which it notes its arguments."""
    place = tmp_path / "engine"
    place.mkdir()

    def install(script: str, **info: str) -> Path:
        (place / "info").write_text(json.dumps({**INFO, "KernelVersion": os.uname().release, **info}))
        client = place / "docker"
        text = script.format(info=shlex.quote(str(place / "info")), place=shlex.quote(str(place)))
        client.write_text(f'#!/bin/sh\necho "$*" >> {shlex.quote(str(place / "calls"))}\n{text}')
        client.chmod(0o755)
        monkeypatch.setenv("VZREPRO_DOCKER", str(client))
        return place / "calls"

    return install


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    place = tmp_path / "store" / disk.PRIVATE / "tmp" / "scratch"
    place.mkdir(parents=True)
    return place


def test_a_file_that_is_seen(engine: Callable[..., Path], scratch: Path) -> None:
    calls = engine(SEES)
    assert sandbox.sharing_of(scratch) == sandbox.Sharing(True, "it sees this machine's files")
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["info", "create", "cp", "rm"]
    assert list(scratch.iterdir()) == []


def test_it_is_asked_once_for_each_store(
    engine: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = engine(SEES)
    sandbox.sharing_of(scratch)
    other = scratch.with_name("other")
    other.mkdir()
    sandbox.sharing_of(other)
    assert calls.read_text().count("create") == 1
    monkeypatch.setattr(sharing, "_known", {})  # as in another process
    sandbox.sharing_of(other)
    assert calls.read_text().count("create") == 1
    sharing.forget(other)
    sandbox.sharing_of(other)
    assert calls.read_text().count("create") == 2
    (kept,) = scratch.parents[1].glob("engine-*.json")
    for text in ("", "[]", '{"place": 1}', kept.read_text().replace("store", "elsewhere")):
        kept.write_text(text)
        monkeypatch.setattr(sharing, "_known", {})
        sandbox.sharing_of(other)
    assert calls.read_text().count("create") == 6


@pytest.mark.parametrize(
    "script",
    [
        "case $1 in info) cat {info} ;; cp) echo another file ;; esac",
        "case $1 in info) cat {info} ;; cp) exit 1 ;; esac",
        "case $1 in info) cat {info} ;; create) echo 'bind source path does not exist: /x' >&2; exit 1 ;; esac",
    ],
)
def test_a_file_that_is_not_seen(engine: Callable[..., Path], scratch: Path, script: str) -> None:
    engine(script)
    assert sandbox.sharing_of(scratch) == sandbox.Sharing(False, "it does not see this machine's files")


def test_an_empty_image_is_made_once(engine: Callable[..., Path], scratch: Path) -> None:
    calls = engine(
        "case $1 in import) : > {place}/image ;; create) "
        "[ -e {place}/image ] || {{ echo 'No such image: vzrepro-empty' >&2; exit 1; }} ;; esac\n" + SEES
    )
    assert sandbox.sharing_of(scratch).mounts
    verbs = [line.split()[0] for line in calls.read_text().splitlines()]
    assert verbs == ["info", "create", "import", "create", "cp", "rm"]


def test_another_kernel_needs_no_look(engine: Callable[..., Path], scratch: Path) -> None:
    calls = engine(SEES, KernelVersion="6.10.14-linuxkit")
    found = sandbox.sharing_of(scratch)
    assert not found.mounts and "6.10.14-linuxkit" in found.reason and os.uname().release in found.reason
    assert calls.read_text().count("\n") == 1


@pytest.mark.parametrize("remote", [False, True])
def test_podman_sees_what_its_client_sees(engine: Callable[..., Path], scratch: Path, remote: bool) -> None:
    calls = engine(SEES)
    host = {"cgroupVersion": "v2", "security": {"rootless": True}, "cpus": 4, "memTotal": 8, "serviceIsRemote": remote}
    podman = {"host": host, "store": {"graphDriverName": "overlay"}, "version": {"Version": "4.3.1"}}
    calls.with_name("info").write_text(json.dumps(podman))
    assert sandbox.sharing_of(scratch).mounts
    assert ("create" in calls.read_text()) == remote


def test_a_disk_that_ignores_case(engine: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(SEES)
    monkeypatch.setattr(disk, "same_name", lambda *_: True)
    found = sandbox.sharing_of(scratch)
    assert not found.mounts and "ignores the case of names" in found.reason


def test_an_engine_that_fails_is_no_answer(engine: Callable[..., Path], scratch: Path) -> None:
    for complaint, message in {"something else": "engine failed", "error during connect: EOF": "not answer"}.items():
        engine(f"case $1 in info) cat {{info}} ;; create) echo '{complaint}' >&2; exit 1 ;; esac")
        with pytest.raises(VzreproError, match=message):
            sandbox.sharing_of(scratch)
    assert not list(scratch.parents[1].glob("engine-*.json"))


def test_a_mount_that_fails_has_it_asked_again(engine: Callable[..., Path], scratch: Path) -> None:
    job = sandbox.Job(
        label="job", image="i", command=("true",), scratch=scratch, log=scratch / "log", source_date_epoch=0, cores=1
    )
    calls = engine(
        "case $1 in run) echo 'bind source path does not exist: /x' >&2; exit 125 ;; container) exit 1 ;; esac\n" + SEES
    )
    with pytest.raises(VzreproError, match="does not see this machine's files any more") as caught:
        sandbox.run(job, on_line=lambda _: None)
    assert "run the same command again" in str(caught.value.hint)
    sandbox.sharing_of(scratch)
    assert calls.read_text().count("create") == 2


def test_a_container_that_is_being_created_when_it_is_interrupted_is_removed(
    engine: Callable[..., Path], scratch: Path
) -> None:
    creating = """
    case $1 in
        info) cat {info} ;;
        create) touch {place}/begun; sleep 0.5; touch {place}/container ;;
        rm) rm {place}/container || {{ echo "Error: No such container: x" >&2; exit 1; }} ;;
    esac
    """
    place = engine(creating).parent
    runtime = sandbox.check()

    def interrupt() -> None:
        while not (place / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=interrupt)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        sharing.find_out(scratch, runtime)
    asking.join()
    time.sleep(0.5)
    assert not (place / "container").exists()
