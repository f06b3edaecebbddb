"""Builds on other machines: a real Temporal server, workers as processes with stores and keys of their own, Docker."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests import servers
from tests.e2e.conftest import PROJECT, Cli, containers
from tests.farms import FarmMachine, TemporalServer
from vzrepro.base.config import Config
from vzrepro.base.errors import Interrupted
from vzrepro.base.model import BuildKey, DrvHash
from vzrepro.base.signing import SigningKey
from vzrepro.cache.narinfo import NarInfo
from vzrepro.cache.places import open_backend
from vzrepro.cache.remote import Patience
from vzrepro.farm.order import Order
from vzrepro.farm.temporal.client import FarmClient
from vzrepro.farm.temporal.server import FarmServer

RECIPE = """
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, local, text

LOW = build("low-{tag}", image=TOOLS_IMAGE, command=["sh", "/in/src/low.sh"], inputs={{"src": local("low.sh")}})
HIGH = build(
    "high-{tag}",
    image=TOOLS_IMAGE,
    command=["sh", "/in/script"],
    inputs={{"low": LOW, "script": text("script-{tag}", {script!r})}},
)
"""
LOW_SH = "echo low {tag} > /out/low; echo a line of low\n"
SCRIPT = "cat /in/low/low > /out/high; echo one; echo two"


@dataclass
class Farm:
    """What a test has: the server, the shared cache, and machines that believe each other's workers."""

    place: Path
    server: TemporalServer
    cache: Path
    seeded: Path
    keys: dict[str, SigningKey]

    def machine(self, name: str, tag: str = "none", *, trusts: tuple[str, ...] = ("one", "two", "seed")) -> FarmMachine:
        """A machine of this name: of worker names there is one of each, others are clients with a workspace."""
        place = self.place / name
        key = self.keys.setdefault(name, SigningKey.generate(f"{name}-1"))
        root = place / "workspace"
        if not place.exists():
            shutil.copytree(PROJECT / "recipes" / "toolchain", root / "recipes" / "toolchain")
            shutil.copy(PROJECT / "lock.toml", root)
        trusted = tuple(str(self.keys[each].public) for each in trusts)
        return FarmMachine(place, name, self.cache.as_uri(), key, trusted, root)

    def client(self, name: str, tag: str, script: str = SCRIPT, low: str = LOW_SH) -> FarmMachine:
        """A client whose workspace has `low-TAG` and `high-TAG`."""
        machine = self.machine(name)
        recipe = machine.root / "recipes" / "small"
        recipe.mkdir(parents=True, exist_ok=True)
        (recipe / "__init__.py").write_text(RECIPE.format(tag=tag, script=script))
        (recipe / "low.sh").write_text(low.format(tag=tag))
        return machine


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory, seeded: Path) -> Iterator[Farm]:
    """A server, and a cache that has the image which the recipes need."""
    place = tmp_path_factory.mktemp("farm")
    keys = {name: SigningKey.generate(f"{name}-1") for name in ("one", "two", "seed")}
    server = TemporalServer(place / "temporal")
    farm = Farm(place, server, place / "cache", seeded, keys)
    seed = farm.machine("seed")
    shutil.copytree(seeded, seed.store, symlinks=True)
    seed.run("cache", "push", "image-tools")
    for narinfo in farm.cache.glob("*.narinfo"):
        # Where the image came from some cache, others have signed it.
        narinfo.write_bytes(NarInfo.parse(narinfo.read_bytes()).signed(keys["seed"]).render())
    server.start()
    yield farm
    server.kill()


@pytest.fixture(scope="module")
def one(farm: Farm) -> Iterator[FarmMachine]:
    """A worker that works all the time."""
    machine = farm.machine("one")
    with machine.working(farm.server):
        yield machine


def events_of(text: str, kind: str) -> list[dict[str, object]]:
    return [event for event in map(json.loads, text.splitlines()) if event.get("event") == kind]


def test_a_worker_builds_and_the_client_takes_its_target_only(farm: Farm, one: FarmMachine) -> None:
    client = farm.client("alice", "first")
    done = client.run("realize", "high-first", "--on", farm.server.url, "--json")
    (result,) = events_of(done.stdout, "result")
    assert (Path(str(result["location"])) / "high").read_text() == "low first\n"
    assert {path.name.partition("-")[2] for path in client.store.glob("*-*")} == {
        "high-first",
        "script-first",
        "files-small",
    }, "neither the image nor what is between comes here"
    assert [e["worker"] for e in events_of(done.stdout, "started") if e["action"] == "build"] in (["one"] * 2, ["one"])
    lines = [e["line"] for e in events_of(done.stdout, "log")]
    assert {"a line of low", "one", "two"} <= set(lines)
    finished = {e["target"]: e["outcome"] for e in events_of(done.stdout, "finished") if e["action"] == "build"}
    assert finished == {"low-first": "built", "high-first": "built"}
    narinfo = (farm.cache / f"{str(result['path'])[11:43]}.narinfo").read_text()
    assert "Sig: one-1:" in narinfo
    assert "alice" not in narinfo


def test_a_worker_leaves_to_others_what_its_key_has_signed(farm: Farm, one: FarmMachine) -> None:
    key = BuildKey.of(b"again")
    order = Order(DrvHash.of(b"again"), key, "again", "linux/amd64", turn=2, apart_from=(farm.keys["one"].public.id,))
    stop = threading.Event()

    class Watch:
        def waits(self, why: str) -> None: ...

        def works(self, worker: str, phase: str) -> None:
            if (worker, phase) == ("one", "leaves it to another builder"):
                stop.set()

        def log(self, stream: str, pieces: int) -> None: ...

        def line(self, text: str) -> None: ...

    with FarmClient(FarmServer.of(farm.server.url, Config())) as client:
        with pytest.raises(Interrupted):
            client.place(order, Watch(), stop)
        assert client.cancel(order.id) == []
    assert "again: begins" not in one.said


def container_of(machine: FarmMachine) -> list[str]:
    return containers(Cli(machine.root, machine.store))


def wait_for(true: Callable[[], object], what: object = None) -> None:
    until = time.monotonic() + 90
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def test_two_clients_that_want_one_thing_follow_one_build(farm: Farm, one: FarmMachine) -> None:
    """One is interrupted and leaves; the other one has both of them built."""
    clients = [farm.client(name, "both", f"echo begun; sleep 6; {SCRIPT}") for name in ("alice", "bob")]
    alice, bob = (client.start("realize", "high-both", "--on", farm.server.url) for client in clients)
    wait_for(lambda: container_of(one) and "high-both: begins" in one.said, one.said)
    alice.send_signal(signal.SIGINT)
    _, err = alice.communicate(timeout=60)
    assert alice.returncode == 130, err
    (id_,) = re.findall(r"vzrepro farm attach (high-both-[0-9a-f]{64})", err)
    assert f"vzrepro farm cancel {id_}" in err
    attached = clients[0].run("farm", "attach", id_, "--on", farm.server.url)
    assert attached.stdout.strip().endswith("-high-both")
    out, err = bob.communicate(timeout=60)
    assert bob.returncode == 0, err
    assert (Path(out.strip()) / "high").read_text() == "low both\n"
    assert one.said.count("high-both: begins") == one.said.count("low-both: begins") == 1
    # What is there needs nobody: the same command again, on another machine, is a download.
    assert "built" not in clients[0].run("realize", "high-both", "--on", farm.server.url).stderr


def test_a_failed_build_says_why_and_keeps_its_log(farm: Farm, one: FarmMachine) -> None:
    client = farm.client("alice", "fails", "echo before; echo because >&2; exit 3")
    failed = client.run("realize", "high-fails", "--on", farm.server.url, code=100)
    assert "one: building high-fails failed: exit code 3" in failed.stderr
    assert "because" in failed.stderr
    assert "vzrepro shell high-fails" in failed.stderr
    assert client.run("log", "high-fails").stdout == "before\nbecause\n"
    assert one.said.count("high-fails: begins") == 1
    assert container_of(one) == []


def test_cancel_and_kill_leave_no_container(farm: Farm) -> None:
    """A killed worker takes its container with it, and the build goes to another; cancelled, nothing is left."""
    two = farm.machine("two")
    client = farm.client("alice", "killed", f"echo begun; sleep 100; {SCRIPT}")
    with two.working(farm.server) as process:
        alice = client.start("realize", "high-killed", "--on", farm.server.url, "--json")
        machines = [farm.machine("one"), two]
        wait_for(lambda: any(container_of(each) and "high-killed: begins" in each.said for each in machines))
        if container_of(two):
            process.kill()
            wait_for(lambda: not container_of(two), "the container of a killed worker stays")
            wait_for(lambda: container_of(machines[0]), "nobody takes over")
        alice.send_signal(signal.SIGINT)
        out, _ = alice.communicate(timeout=60)
        assert alice.returncode == 130
        (error,) = events_of(out, "error")
        (id_,) = re.findall(r"vzrepro farm cancel (\S+)", str(error["hint"]))
        client.run("farm", "cancel", id_, "--on", farm.server.url)
        wait_for(lambda: not any(container_of(each) for each in machines), "a cancelled build goes on")


def test_a_command_is_a_farm_too(farm: Farm) -> None:
    """`farm build` runs on a machine that has nothing but the cache; here a shell stands for the way there."""
    machine = farm.machine("two")
    remote = farm.place / "remote"
    env = {name: value for name, value in machine.environment().items() if name.startswith(("VZREPRO_", "XDG_"))}
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    remote.write_text(f'cd {machine.place}; exec env {words} {sys.executable} -m vzrepro farm build "$@"\n')
    client = farm.client("alice", "command")
    client.env["VZREPRO_FARM"] = f"command: echo for {{platform}}; sh {remote} {{drv}}"
    assert "a worker for linux/amd64 (small) builds it" in client.run("realize", "high-command", "--dry-run").stdout
    done = client.run("realize", "high-command", "--json")
    (result,) = events_of(done.stdout, "result")
    assert (Path(str(result["location"])) / "high").read_text() == "low command\n"
    lines = "\n".join(str(e["line"]) for e in events_of(done.stdout, "log"))
    assert "for linux/amd64" in lines
    assert "a line of low" in lines
    client = farm.client("alice", "command-fails", "echo no; exit 3")
    client.env["VZREPRO_FARM"] = f"command: sh {remote} {{drv}}"
    assert "exit code 3" in client.run("realize", "high-command-fails", code=100).stderr


def test_whose_word_counts(farm: Farm, one: FarmMachine) -> None:
    """The client believes signatures by its trusted keys, whatever the queue says; the worker those by its own."""
    client = farm.client("alice", "trust")
    client.trusted = (str(farm.keys["two"].public), str(farm.keys["seed"].public))
    failed = client.run("realize", "high-trust", "--on", farm.server.url, code=103)
    assert "not signed by a trusted key" in failed.stderr
    assert "one-1" in failed.stderr
    assert list(client.store.glob("*-low-trust")) == []

    elsewhere = farm.client("carol", "elsewhere")
    elsewhere.cache = (farm.place / "another").as_uri()
    shutil.copytree(farm.cache, farm.place / "another")
    failed = elsewhere.run("realize", "high-elsewhere", "--on", farm.server.url, code=2)
    assert re.search("has no drv/.*json", failed.stderr)
    assert "must have the same cache" in failed.stderr


def test_through_a_bucket_with_signed_orders(farm: Farm, seaweed: servers.S3Server, credentials: None) -> None:
    """Lines come while it builds, nothing of them stays, and who is not named has nothing built."""
    url, place = farm.server.bucket_url, seaweed.url("common", "farm")
    script = f"echo early; sleep 6; echo late; {SCRIPT}"
    alice, mallory = (farm.client(name, "bucket", script) for name in ("alice", "mallory"))
    two, bucket = farm.machine("two"), open_backend(place, Patience(30), Path())
    for narinfo in farm.cache.glob("*.narinfo"):
        info = NarInfo.parse(narinfo.read_bytes())
        if info.path.name == "image-tools":
            bucket.put(info.url, farm.cache / info.url)
            bucket.put(narinfo.name, narinfo)
    for machine in (alice, mallory, two):
        machine.env |= servers.CREDENTIALS
        machine.cache = place
    two.env["VZREPRO_FARM_CLIENTS"] = str(farm.keys["alice"].public)
    with two.working(farm.server, url=url):
        failed = mallory.run("realize", "high-bucket", "--on", url, code=103)
        assert "the order for low-bucket is not signed by a trusted key" in failed.stderr
        done = alice.run("realize", "high-bucket", "--on", url, "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (early,) = [e for e in events if e["event"] == "log" and e["line"] == "early"]
    (late,) = [e for e in events if e["event"] == "log" and e["line"] == "late"]
    assert early["time"] < late["time"]
    assert [e["line"] for e in events if e["event"] == "log" and e["path"].endswith("-high-bucket")][-4:] == [
        "early",
        "late",
        "one",
        "two",
    ]
    listed = alice.run("cache", "ls", "--json").stdout
    assert "high-bucket" in listed
    assert [entry.key for entry in bucket.list("log/") if ".live/" in entry.key] == []


@pytest.mark.thorough
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_worker_with_a_full_disk_leaves_builds_to_others(farm: Farm) -> None:
    full, three = farm.machine("two"), farm.machine("three")
    client = farm.client("alice", "full")
    client.trusted = (*client.trusted, str(farm.keys["three"].public))
    full.env["VZREPRO_STORE"] = str(farm.place / "small")
    (farm.place / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "small", farm.place / "small"], check=True)
    try:
        with full.working(farm.server, url=farm.server.bucket_url):
            alice = client.start("realize", "low-full", "--on", farm.server.bucket_url)
            wait_for(lambda: "is full" in full.said, full.said)
            with three.working(farm.server, url=farm.server.bucket_url):
                out, err = alice.communicate(timeout=300)
        assert alice.returncode == 0, err
        assert (Path(out.strip()) / "low").read_text() == "low full\n"
        assert "nothing is taken for 30 s" in full.said
        assert "low-full: built" in three.said
    finally:
        subprocess.run(["umount", farm.place / "small"], check=True)


@pytest.mark.thorough
def test_an_audit_is_made_by_all_workers(farm: Farm, one: FarmMachine, project: Cli) -> None:
    """Each looks for itself, signs what it has found, and what differs is compared here; nothing else comes here."""
    seed, two = farm.machine("seed"), farm.machine("two")
    tools = farm.place / "tools"
    Cli(project.root, tools).realize("audit-tools")
    replace(seed, root=PROJECT, env={"VZREPRO_STORE": str(tools)}).run("cache", "push", "audit-tools")
    # Its caches have other signatures; so does what it is made from, which nobody needs.
    for narinfo in farm.cache.glob("*.narinfo"):
        if "-audit-tools" in (text := narinfo.read_text()) and "Sig: seed-1:" not in text:
            narinfo.write_bytes(NarInfo.parse(text.encode()).signed(farm.keys["seed"]).render())
    client = farm.client("auditor", "audit", "touch f; tar -c --mtime=@0 --owner=0 --group=0 f > /out/x; echo made")
    reserved = client.store / ".vzrepro"
    with two.working(farm.server):
        client.run("realize", "high-audit", "--on", farm.server.url)
        words = ("audit", "high-audit", "--axes", "umask,host-name,time-zone,home", "--on", farm.server.url)
        done = client.run(*words, "--json", code=104)
    (report,) = [line for line in map(json.loads, done.stdout.splitlines()) if "nodes" in line]
    nodes = {node["target"]: node for node in report["nodes"]}
    verdicts = {axis: cell["verdict"] for axis, cell in nodes["high-audit"]["cells"].items()}
    assert verdicts == {
        **dict.fromkeys(("repeat", "host-name", "time-zone", "home"), "REPRODUCED"),
        "umask": "DIFFERS",
    }
    assert [cause["axis"] for cause in nodes["high-audit"]["causes"]] == ["umask"]
    assert nodes["low-audit"]["verdict"] == "REPRODUCED"
    assert len(report["explanations"]) == 1
    assert "low-audit: rebuilt" in one.said + two.said
    assert all("high-audit: rebuilt" in machine.said for machine in (one, two)), "side by side"
    assert {path.name.partition("-")[2] for path in client.store.glob("*-*")} <= {
        *("high-audit", "script-audit", "files-small"),
        *(path.name.partition("-")[2] for path in client.store.glob("*-*") if "diffoscope" in path.name),
    }
    assert (reserved / "audit").is_dir()
    votes = client.run("challenge", "high-audit", "--against", farm.cache.as_uri()).stdout
    assert "one" in votes


def test_what_is_missing_is_said(farm: Farm, tmp_path: Path) -> None:
    client = farm.client("alice", "missing")
    hidden = tmp_path / "hidden" / "temporalio"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError('no temporalio', name='temporalio')")
    without = replace(client, env={"PYTHONPATH": f"{hidden.parent}:{PROJECT}"})
    failed = without.run("realize", "high-missing", "--on", farm.server.url, code=2)
    assert f"{sys.executable} -m pip install temporalio" in failed.stderr
    no_key = replace(client, env={"VZREPRO_UPLOAD_KEY": ""})
    assert "upload-key" in no_key.run("realize", "high-missing", "--on", farm.server.url, code=2).stderr
    no_docker = replace(farm.machine("two"), env={"VZREPRO_DOCKER": "/nowhere/docker"})
    assert "Docker" in no_docker.run("farm", "worker", "--on", farm.server.url, code=1).stderr
    assert "no farm" in client.run("farm", "status", code=2).stderr
    with servers.refusing() as port:
        failed = client.run("farm", "list", "--on", f"temporal://127.0.0.1:{port}", code=105)
        assert "no Temporal server" in failed.stderr
