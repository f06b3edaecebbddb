"""What is known of containers from their directories alone: states of older versions, what killed commands left, who
does not answer."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vzrepro import cli
from vzrepro.base import disk
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.vm import containers, places, volumes
from vzrepro.guest.vm.rootfs import Image, ImageConfig
from vzrepro.guest.vm.spec import Mount, User, Volume

# What the version before `oci ps` wrote.
OLD = {
    "container_id": "web",
    "pid": 1,
    "bundle": "/run/vz/containers/web",
    "env": {"PATH": "/bin"},
    "root": "/images/1",
    "config": {"entrypoint": [], "cmd": ["sh"], "env": {}, "stop_signal": "SIGQUIT"},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    home = tmp_path / "vz"
    home.mkdir()
    return home


@pytest.fixture
def web(home: Path) -> Iterator[Path]:
    """A container that has a supervisor, which is this test."""
    path, lock = containers.claim("web")
    (path / "state.json").write_text(json.dumps(OLD))
    yield path
    os.close(lock)


def test_the_state_of_an_older_version_is_read(web: Path) -> None:
    state = containers.load("web")
    assert state.config.stop_signal == "SIGQUIT"
    assert (state.created, state.profile, state.ports, state.command) == (None, None, (), ())
    containers.save(state)
    assert containers.load("web") == state
    assert json.loads((web / "state.json").read_text())["format"] == 1
    assert sorted(path.name for path in web.iterdir()) == ["state.json"]


def test_a_state_that_is_not_readable_is_told(web: Path) -> None:
    for text in ("{", json.dumps(OLD | {"format": 2}), json.dumps({"pid": 1})):
        (web / "state.json").write_text(text)
        with pytest.raises(VzreproError, match="is not readable"):
            containers.load("web")
        assert [one.status for one in containers.listed()] == ["unreadable"]


VERBS = ("start", "exec", "logs", "state", "kill", "stop", "delete")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code of `vzrepro oci …`, and what it says."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["oci", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_another_profile_and_ids_of_nobody(
    web: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    command = ["--", "true"] if verb == "exec" else []
    code, said = refused(capsys, verb, "--kernel-profile", "developer", "web", *command)
    assert (code, "container web does not have the kernel of the developer profile" in said) == (2, True)
    code, said = refused(capsys, verb, "nobody", *command)
    assert (code, "there is no container nobody" in said) == (2, True)
    code, said = refused(capsys, verb, "../web", *command)
    assert (code, "cannot be the id of a container" in said) == (2, True)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("delete", "state", "logs")])
def test_every_verb_that_wants_a_guest_says_that_it_is_gone(
    home: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (home / "gone").mkdir()
    (home / "gone/state.json").write_text(json.dumps(OLD | {"container_id": "gone"}))
    (home / "gone/log").write_text("the guest's last words\n")
    code, said = refused(capsys, verb, "gone", *(["--", "true"] if verb == "exec" else []))
    assert code == 1
    assert "the guest of container gone is gone" in said
    assert "the guest's last words" in said
    assert "vzrepro oci delete gone" in said


def test_an_older_container_keeps_no_output_and_says_so(web: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, "logs", "web")
    assert code == 1
    assert "nothing is kept of what container web prints" in said


def test_nothing_is_listed_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert containers.listed() == []


def test_what_killed_commands_left_is_listed_and_told_apart(web: Path, home: Path) -> None:
    (home / ".run-1").mkdir()
    (home / "cut").mkdir()  # a creation that was killed
    (home / "gone").mkdir()
    (home / "gone/state.json").write_text(json.dumps(OLD | {"container_id": "gone"}))
    (home / "gone/log").write_text("the guest's last words\n")
    (web / "state.json").unlink()
    assert [(one.container_id, one.status) for one in containers.listed()] == [
        ("cut", "gone"),
        ("gone", "gone"),
        ("web", "creating"),
    ]
    with pytest.raises(UsageError, match="web is still being created"):
        containers.load("web")
    for container in ("cut", "gone"):
        with (
            pytest.raises(VzreproError, match=f"the guest of container {container} is gone"),
            containers.connected(container),
        ):
            pass
        with pytest.raises(UsageError, match="there is a container"):
            containers.claim(container)
        containers.delete(container, force=False)
    assert [one.container_id for one in containers.listed()] == ["web"]


def test_many_that_do_not_answer_are_asked_at_once(home: Path, monkeypatch: pytest.MonkeyPatch, web: Path) -> None:
    """Sockets that take connections and say nothing: to ask one after the other would take longer than is waited."""
    monkeypatch.setattr(containers, "_LOOK_SECS", 1.0)
    names = [f"c{number:02}" for number in range(20)]
    locks, listeners = [], []
    for name in names:
        path, lock = containers.claim(name)
        (path / "state.json").write_text(json.dumps(OLD | {"container_id": name}))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path / "agent"))
        listener.listen()
        locks.append(lock)
        listeners.append(listener)
    found: list[containers.ListedContainer] = []
    thread = threading.Thread(target=lambda: found.extend(containers.listed()), daemon=True)
    thread.start()
    thread.join(19)
    assert [(one.container_id, one.status) for one in found] == [(name, "unreachable") for name in [*names, "web"]]
    for each in listeners:
        each.close()
    for lock in locks:
        os.close(lock)


def test_who_asks_whether_a_container_lives_misleads_nobody_else(home: Path) -> None:
    path, lock = containers.claim("web")
    assert disk.held(path)
    os.close(lock)
    asker = os.open(path, os.O_RDONLY)
    fcntl.flock(asker, fcntl.LOCK_SH)  # as `held` does for a moment
    assert not disk.held(path)
    os.close(asker)


def test_a_new_volume_is_like_what_it_covers_and_an_old_one_as_it_is(home: Path, tmp_path: Path) -> None:
    image = Image(tmp_path / "root", ImageConfig())
    covered = image.root / "var/data"
    covered.mkdir(parents=True)
    covered.chmod(0o1777)
    made = volumes.mount(Volume("a", "/var/data"), image, User(1000, 7))
    assert made == Mount(tmp_path / "data/vz/volumes/a", "/var/data")
    assert stat.S_IMODE(made.source.stat().st_mode) == 0o1777
    made.source.chmod(0o700)
    assert volumes.mount(Volume("a", "/x", read_only=True), image, User()) == Mount(made.source, "/x", True)
    assert stat.S_IMODE(made.source.stat().st_mode) == 0o700
    other = volumes.mount(Volume("b", "/not/there"), image, User(1000, 7)).source.stat()
    assert stat.S_IMODE(other.st_mode) == 0o755
    if os.geteuid() == 0:
        assert (other.st_uid, other.st_gid) == (1000, 7)
        assert made.source.stat().st_uid == 0


def test_a_volume_that_is_a_file_is_none(home: Path, tmp_path: Path) -> None:
    places.volumes().mkdir(parents=True)
    (places.volumes() / "a").write_text("")
    with pytest.raises(VzreproError, match="is not a directory"):
        volumes.mount(Volume("a", "/x"), Image(tmp_path, ImageConfig()), User())
