"""`vzrepro realize` on little recipes in the real sandbox: what is built, what is not, and every way to fail."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from tests.e2e.conftest import LOW_SH, SMALL, Cli, containers, interrupt_when


def _actions(cli: Cli, *words: str) -> dict[str, str]:
    """Target → outcome of everything that `realize --json` did."""
    lines = cli.run("realize", *words, "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    return {e["target"]: e["outcome"] for e in events if e["event"] == "finished" and e["action"] != "push"}


def test_builds_and_prints_one_path(small: Cli, tmp_path: Path) -> None:
    calls, client = tmp_path / "calls", tmp_path / "client"
    client.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexec docker "$@"\n')
    client.chmod(0o755)
    result = replace(small, env=small.env | {"VZREPRO_DOCKER": str(client)}).run("realize", "high")
    weights = dict(re.findall(r"vzrepro.target=(\w+) .*?(?:--cpu-shares (\d+) )?--entrypoint", calls.read_text()))
    info = subprocess.run(["docker", "info", "--format", "{{.CPUShares}}"], capture_output=True, text=True, check=True)
    half = "128" if info.stdout.strip() == "true" else ""
    assert weights == {"low": "", "high": half}, "half as much waits for high"
    (line,) = result.stdout.splitlines()
    high = Path(line)
    assert high.parent == small.store
    assert (high / "high").read_text() == "low\nThu Jan  1 00:00:00 UTC 2026\n"
    assert (high / "high").stat().st_mode & 0o777 == 0o444
    assert (high / "high").stat().st_mtime == 1
    assert "build low" in result.stderr
    assert _actions(small, "high") == {}
    small.run("store", "verify")
    assert containers(small) == []


def test_early_cutoff(small: Cli) -> None:
    """A comment in an input that leaves the output as it was rebuilds nothing above."""
    first = small.realize("high")[0]
    (small.root / "recipes/small/low.sh").write_text("# a comment\n" + LOW_SH)
    assert _actions(small, "high") == {"files-small": "fetched", "low": "built", "high": "copied"}
    second = small.realize("high")[0]
    assert second != first
    assert (second / "high").read_bytes() == (first / "high").read_bytes()
    assert (second / "high").stat().st_ino != (first / "high").stat().st_ino


def test_second_store_takes_from_the_machine_cache(small: Cli, tmp_path: Path) -> None:
    small.realize("high")
    other = Cli(small.root, tmp_path / "other store", small.env)
    assert _actions(other, "high") == {"high": "substituted"}
    other.run("store", "verify")
    assert other.run("log", "low").stdout == small.run("log", "low").stdout == "low\n"


def test_early_cutoff_across_stores(small: Cli, tmp_path: Path) -> None:
    """The build record in the cache gives the object although its own name was never built."""
    small.realize("high")
    (small.root / "recipes/small/low.sh").write_text("# a comment\n" + LOW_SH)
    small.realize("low")
    other = Cli(small.root, tmp_path / "other store", small.env)
    assert _actions(other, "high")["high"] == "copied"
    assert (other.realize("high")[0] / "high").read_text().startswith("low\n")


def test_no_substitute_builds(small: Cli, tmp_path: Path, seeded: Path) -> None:
    first = small.realize("high")[0]
    other = Cli(small.root, tmp_path / "other", small.env)
    shutil.copytree(seeded, other.store, symlinks=True)
    actions = _actions(other, "high", "--no-substitute")
    assert actions == {"files-small": "fetched", "low": "built", "script": "fetched", "high": "built"}
    assert small.run("store", "info", "high", "--json").stdout.replace(str(small.store), "") == other.run(
        "store", "info", "high", "--json"
    ).stdout.replace(str(other.store), "")
    assert first.name == other.realize("high")[0].name


def test_two_processes_build_once(small: Cli) -> None:
    small.write(small=SMALL.replace("PAUSE-0", "PAUSE-4"))
    one, two = small.start("realize", "high"), small.start("realize", "high")
    (out1, err1), (out2, err2) = one.communicate(timeout=600), two.communicate(timeout=600)
    assert one.returncode == two.returncode == 0, err1 + err2
    assert out1 == out2
    waited = [err for err in (err1, err2) if "wait" in err]
    assert len(waited) >= 1, err1 + err2
    assert any(str(process.pid) in err for process in (one, two) for err in waited)
    assert (err1 + err2).count(" high built") == 1


def test_dry_run_prints_the_plan(small: Cli) -> None:
    out = small.run("realize", "high", "--dry-run").stdout
    steps = [line.split()[:2] for line in out.splitlines()[1:]]
    assert steps == [["import", "files-small"], ["build", "low"], ["import", "script"], ["build", "high"]]
    assert "unless low come out as they were" in out
    small.realize("high")
    assert "nothing to do" in small.run("realize", "high", "--dry-run").stdout


def test_out_link_is_a_root(small: Cli) -> None:
    link = small.root / "result"
    high = Path(small.run("realize", "high", "--out-link", "result").stdout.strip())
    assert link.resolve() == high
    small.run("store", "gc")
    assert high.is_dir()
    assert str(link) in small.run("store", "roots").stdout
    link.unlink()
    small.run("store", "gc")
    assert not high.exists()
    assert small.realize("high") == [high]


def test_why_names_the_change(small: Cli) -> None:
    small.realize("high")
    (small.root / "recipes/small/low.sh").write_text("echo other > /out/low\n")
    out = small.run("why", "high").stdout
    assert "inputs.low" in out
    assert "content.low.sh" in out
    out = small.run("why", "high", "--json").stdout
    assert json.loads(out)["changes"][-1]["target"] == "files-small"


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_build_says_all(small: Cli) -> None:
    (small.root / "recipes/small/low.sh").write_text("for n in $(seq 50); do echo line $n; done; exit 3\n")
    err = small.run("realize", "high", code=100).stderr
    assert "line 50" in err
    assert "line 10\n" not in err
    assert "vzrepro shell low" in err
    log = next(word for word in err.split() if word.endswith(".log"))
    assert "line 1\n" in Path(log).read_text()
    assert "line 1\n" in small.run("log", "low").stdout
    assert containers(small) == []
    assert not list((small.store / ".vzrepro/tmp").iterdir())


def test_keep_failed_keeps_the_sandbox(small: Cli) -> None:
    (small.root / "recipes/small/low.sh").write_text("echo kept > /build/evidence; exit 3\n")
    err = small.run("realize", "low", "--keep-failed", code=100).stderr
    command = next(line for line in err.splitlines() if "docker" in line and "run" in line)
    words = command[command.index("docker") :]
    (evidence,) = (small.store / ".vzrepro/tmp").rglob("evidence")
    assert evidence.read_text() == "kept\n"
    assert str(evidence.parent) in words
    reopened = subprocess.run(
        ["script", "-qec", f"{words}", "/dev/null"],
        check=False,
        input="cat evidence; exit\n",
        capture_output=True,
        text=True,
    )
    assert "kept" in reopened.stdout


def test_time_limit(small: Cli) -> None:
    small.write(small=SMALL.replace('command=["sh", "/in', 'timeout_secs=2, command=["sh", "/in'))
    (small.root / "recipes/small/low.sh").write_text("sleep 100\n")
    assert "time limit" in small.run("realize", "low", code=101).stderr
    assert containers(small) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(small: Cli, number: int) -> None:
    (small.root / "recipes/small/low.sh").write_text("echo started; sleep 100\n")
    process = small.start("realize", "high")
    _out, err = interrupt_when(process, "build low", number)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert containers(small) == []
    assert not list((small.store / ".vzrepro/tmp").iterdir())
    (small.root / "recipes/small/low.sh").write_text(LOW_SH)
    small.realize("high")


def test_interrupted_twice(small: Cli) -> None:
    (small.root / "recipes/small/low.sh").write_text("trap '' INT TERM; sleep 1000\n")
    process = small.start("realize", "high")
    while not containers(small):
        assert process.poll() is None, process.communicate()
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _out, err = process.communicate(timeout=PATIENCE_SECS)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert containers(small) == [], err


def test_kill_9_leaves_nothing_half_done(small: Cli) -> None:
    (small.root / "recipes/small/low.sh").write_text("echo started; sleep 100\n")
    process = small.start("realize", "high")
    interrupt_when(process, "build low", signal.SIGKILL, inside=small)
    (small.root / "recipes/small/low.sh").write_text(LOW_SH)
    small.realize("high")
    small.run("store", "verify")
    assert containers(small) == []
    assert not list((small.store / ".vzrepro/tmp").iterdir())


def test_hash_mismatch_names_both(small: Cli, tmp_path: Path) -> None:
    """The lock pins one thing, the mirror has another."""
    mirror = tmp_path / "mirror/pool"
    mirror.mkdir(parents=True)
    (mirror / "thing.orig.tar.xz").write_text("wrong")
    _want_source(small, "thing", "pool/thing.orig.tar.xz", sha256="0" * 64, size=5)
    small.env["VZREPRO_MIRRORS"] = f"debian=file://{tmp_path}/mirror"
    err = small.run("realize", "thing", code=102).stderr
    assert "0" * 64 in err
    assert hashlib.sha256(b"wrong").hexdigest() in err


def test_url_change_under_an_unchanged_hash_is_fetched_again(small: Cli, tmp_path: Path) -> None:
    data = b"the source"
    for name in ("one", "two"):
        (tmp_path / "mirror/pool").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror/pool" / f"{name}.tar").write_bytes(data)
    small.env["VZREPRO_MIRRORS"] = f"debian=file://{tmp_path}/mirror"
    digest = hashlib.sha256(data).hexdigest()
    _want_source(small, "thing", "pool/one.tar", sha256=digest, size=len(data))
    assert _actions(small, "thing")["source-thing"] == "fetched"
    # The file's name in the store is that of its URL; the hash alone decides when the name stays.
    _want_source(small, "thing", "pool/two/one.tar", sha256=digest, size=len(data))
    err = small.run("realize", "source-thing", code=105).stderr
    assert "pool/two/one.tar" in err
    (tmp_path / "mirror/pool/two").mkdir()
    (tmp_path / "mirror/pool/two/one.tar").write_bytes(data)
    assert _actions(small, "source-thing") == {"source-thing": "fetched"}
    assert _actions(small, "source-thing") == {}


def test_a_new_url_with_the_old_hash_is_not_served_from_the_old_file(small: Cli, tmp_path: Path) -> None:
    """A version was raised and the hash forgotten: the old bytes, still here under the old name, must not stand in."""
    (tmp_path / "mirror/pool").mkdir(parents=True)
    (tmp_path / "mirror/pool/thing-1.tar").write_bytes(b"one")
    (tmp_path / "mirror/pool/thing-2.tar").write_bytes(b"two")
    small.env["VZREPRO_MIRRORS"] = f"debian=file://{tmp_path}/mirror"
    digest = hashlib.sha256(b"one").hexdigest()
    _want_source(small, "thing", "pool/thing-1.tar", sha256=digest, size=3)
    small.realize("thing")
    _want_source(small, "thing", "pool/thing-2.tar", sha256=digest, size=3)
    err = small.run("realize", "thing", code=102).stderr
    assert digest in err
    assert hashlib.sha256(b"two").hexdigest() in err


def _want_source(cli: Cli, name: str, path: str, *, sha256: str, size: int) -> None:
    """Add a recipe that copies a pinned Debian source, and its pin."""
    cli.write(
        thing=f"""
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, debian_source
S = debian_source("{name}", series="1", suite="trixie")
build("{name}", image=TOOLS_IMAGE, command=["cp", "/in/s", "/out/s"], inputs={{"s": S}})
"""
    )
    from vzrepro.base.model import FileHash
    from vzrepro.recipe import lock as locks
    from vzrepro.recipe.evaluate import evaluate
    from vzrepro.recipe.lock import PinnedFile, SourcePin
    from vzrepro.recipe.lock.writing import render

    lock_file = cli.root / "lock.toml"
    lock = locks.load(lock_file)
    wants = evaluate(cli.root, lock, "linux/amd64", lenient=True).wants
    (want,) = (want for want in wants if want.name == name)
    pin = SourcePin(want.request, "1.0", PinnedFile(f"mirror://debian/{path}", FileHash(sha256), size))
    text = render(locks.Lock({**lock.sources, name: pin}, lock.images, lock.crate_sets), lock_file.read_text())
    lock_file.write_text(text)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"VZREPRO_DOCKER": "/nonexistent/docker"}, ["no Docker client was found", "apt-get install docker.io"]),
        ({"DOCKER_HOST": "unix:///nonexistent.sock"}, ["daemon"]),
    ],
)
def test_no_docker(small: Cli, environ: dict[str, str], words: list[str]) -> None:
    small.env.update(environ)
    err = small.run("realize", "high", code=1).stderr
    for word in words:
        assert word in err
    assert "hint:" in err


def test_no_docker_is_no_matter_when_nothing_is_built(small: Cli) -> None:
    small.realize("high")
    small.env["VZREPRO_DOCKER"] = "/nonexistent/docker"
    small.realize("high")


def test_no_network(small: Cli, tmp_path: Path) -> None:
    """Without the files, every place that was tried is named; with them, nobody asks the network."""
    small.env["VZREPRO_MIRRORS"] = "debian=http://127.0.0.1:9/debian"
    small.env["http_proxy"] = small.env["https_proxy"] = "http://127.0.0.1:9"
    small.realize("high")
    empty = Cli(small.root, tmp_path / "empty", {**small.env, "VZREPRO_MACHINE_CACHE": "false"})
    err = empty.run("realize", "debs-tools", code=105).stderr
    assert "127.0.0.1:9" in err
    assert "VZREPRO_MIRRORS" in err


def test_broken_lock_and_recipe(small: Cli) -> None:
    lock = small.root / "lock.toml"
    text = lock.read_text()
    lock.write_text(text.replace("[image.tools", "[image.stools"))
    assert "lock.toml has no image 'tools'" in small.run("realize", "high", code=2).stderr
    assert "run: vzrepro lock" in small.run("realize", "high", code=2).stderr
    lock.write_text(text)
    small.write(small=SMALL + "\ndef f(:\n")
    assert "recipes/small/__init__.py" in small.run("realize", "high", code=2).stderr
    small.write(small=SMALL)
    assert "high" in small.run("realize", "hihg", code=2).stderr
    small.run("realize", code=2)
    small.run("realise", "high", code=2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("free_kib", [64, 200, 1000, 3000])
def test_full_disk(small: Cli, mounted: Callable[[str], Path], seeded: Path, free_kib: int) -> None:
    """One clear error wherever the disk fills up, and after making room the same command goes on."""
    place = mounted("size=400m")
    store = place / "store"
    shutil.copytree(seeded, store, symlinks=True)
    cli = Cli(small.root, store, {**small.env, "VZREPRO_MACHINE_CACHE": "false"})
    (small.root / "recipes/small/low.sh").write_text(LOW_SH + "head -c 4000000 /dev/zero > /out/big\n")
    ballast = place / "ballast"
    free = shutil.disk_usage(place).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - free_kib * 1024)
    result = cli.start("realize", "high")
    _out, err = result.communicate(timeout=PATIENCE_SECS)
    assert result.returncode in (1, 100), err
    assert "Traceback" not in err
    assert "No space left" in err or "full" in err, err
    ballast.unlink()
    cli.realize("high")
    cli.run("store", "verify")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a read-only file system")
def test_read_only_store(small: Cli, mounted: Callable[[str], Path]) -> None:
    high = small.realize("high")[0]
    place = mounted("size=400m")
    shutil.copytree(small.store, place / "store", symlinks=True)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    cli = Cli(small.root, place / "store", small.env)
    assert cli.realize("high")[0].name == high.name
    (small.root / "recipes/small/low.sh").write_text("echo other > /out/low\n")
    err = cli.run("realize", "high", code=1).stderr
    assert "read-only" in err.lower()
    assert "Traceback" not in err


# --- verify and repair ------------------------------------------------------------------------------------------------


def test_verify_and_repair(small: Cli) -> None:
    low, high = small.realize("low", "high")
    content = (high / "high").read_bytes()
    (high / "high").chmod(0o644)
    (high / "high").write_bytes(b"L" + content[1:])
    (low / "low").unlink()
    (small.store / "foreign").write_text("x")
    err = small.run("store", "verify", code=1)
    assert "corrupt" in err.stdout
    assert "foreign" in err.stdout
    small.run("store", "repair")
    assert (high / "high").read_bytes() == content
    assert (low / "low").read_text() == "low\n"
    (small.store / "foreign").unlink()
    small.run("store", "verify")


def test_repair_builds_again_without_a_cache(small: Cli) -> None:
    low = small.realize("low")[0]
    shutil.rmtree(small.root.parent / "cache")
    (low / "low").chmod(0o644)
    (low / "low").write_text("lox\n")
    small.run("store", "repair", "low")
    assert (low / "low").read_text() == "low\n"


def test_a_lying_mirror_server_cannot_get_in(small: Cli, tmp_path: Path) -> None:
    """A server that sends other bytes under the right size: refused, and the next mirror is asked."""

    class Liar(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"the SOURCE")

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "good/pool").mkdir(parents=True)
    (tmp_path / "good/pool/one.tar").write_bytes(b"the source")
    _want_source(small, "thing", "pool/one.tar", sha256=hashlib.sha256(b"the source").hexdigest(), size=10)
    small.env["VZREPRO_MIRRORS"] = f"debian=http://127.0.0.1:{server.server_port} debian=file://{tmp_path}/good"
    assert _actions(small, "source-thing") == {"source-thing": "fetched"}
    server.shutdown()
