"""The axes in real containers: each takes effect, on what it is about and on nothing else; what is held is the same
twice. Needs Docker, the tools image and the C image."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Cli
from vzrepro import sandbox
from vzrepro.base.errors import BuildFailed
from vzrepro.proof.audit import observed
from vzrepro.proof.audit.axes import AXES, Axis
from vzrepro.proof.audit.changes import World, baseline
from vzrepro.proof.audit.observed import Observed
from vzrepro.sources import image

EPOCH = 1767225600
BY_NAME = {axis.name: axis for axis in AXES}
VARIED = [axis.name for axis in AXES if axis.vary is not None]
RESULT = "it went well"


@dataclass(frozen=True)
class Places:
    """Realized once: the ids of the images, loaded, and what the axes may use."""

    tools_image: str
    c_image: str
    world: World
    tree: Path


@pytest.fixture(scope="module")
def places(project: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    tools, *archives = project.realize("audit-tools", "image-tools", "image-c")
    ids = [str(image.image_id(archive)) for archive in archives]
    for archive, identity in zip(archives, ids, strict=True):
        sandbox.load_image(archive, identity)
    tree = tmp_path_factory.mktemp("input") / "tree"
    tree.mkdir()
    for name in "abcdefghijkl":
        (tree / name).write_text(name)
    os.utime(tree, (1, 1))  # as old as a store object
    shm = Path(tempfile.mkdtemp(prefix="vzrepro-test-", dir="/dev/shm"))
    yield Places(ids[0], ids[1], World(sandbox.check(), tools, 2, shm), tree)
    assert list(shm.iterdir()) == [], "every job's part of it was removed"
    shm.rmdir()


@dataclass(frozen=True)
class Run:
    """What came of a build: the observer's line, the builder's lines, the files in /out."""

    seen: Observed | None
    lines: list[str]
    out: dict[str, bytes]


@dataclass
class Bench:
    """Makes jobs and runs them."""

    places: Places
    folder: Path

    def job(self, script: str, **changes: Any) -> sandbox.Job:
        scratch = self.folder / uuid.uuid4().hex
        scratch.mkdir(mode=0o700)
        fields: dict[str, Any] = {
            "label": "test-axes",
            "image": self.places.tools_image,
            "command": ("bash", "-c", script),
            "scratch": scratch,
            "log": self.folder / "log",
            "source_date_epoch": EPOCH,
            "cores": 2,
            "memory_bytes": 2 << 30,
            "inputs": {"tree": self.places.tree},
        }
        return baseline(sandbox.Job(**(fields | changes)), self.places.world)

    def vary(self, name: str, job: sandbox.Job, count: int = 0) -> sandbox.Job:
        vary = BY_NAME[name].vary
        assert vary is not None
        return vary(job, self.places.world, count)

    def hold(self, name: str, job: sandbox.Job) -> sandbox.Job:
        hold = BY_NAME[name].hold
        assert hold is not None
        return hold(job, self.places.world)

    def run(self, job: sandbox.Job) -> Run:
        lines: list[str] = []
        try:
            sandbox.run(job, on_line=lines.append)
            out = {path.name: path.read_bytes() for path in job.out.iterdir() if path.is_file()}
        finally:
            sandbox.discard(job)
        found = [seen for line in lines if (seen := observed.parse(line)) is not None]
        return Run(found[0] if found else None, [line for line in lines if observed.parse(line) is None], out)


@pytest.fixture
def bench(places: Places, tmp_path: Path) -> Bench:
    return Bench(places, tmp_path)


# What the commands of a recipe see: `fact name value` lines, told apart from all else.
FACTS = r"""
fact() { printf 'fact %s %s\n' "$1" "$(shift; "$@" 2>&1 | tr '\n' ' ')"; }
fact build-path pwd
fact host-name cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname /etc/hostname /etc/hosts
fact user id
fact umask bash -c umask
fact time-zone bash -c 'echo $TZ; date -d @0 +%F.%H'
fact locale bash -c 'echo $LC_ALL; printf "a\nB\nA\n" | sort; env printf %.1f 1; locale decimal_point'
fact home bash -c 'cd && pwd && touch file && rm file'
fact path printenv PATH
fact environment bash -c 'env | cut -d= -f1 | sort'
fact cores bash -c 'echo $VZ_CORES; nproc'
fact memory head -n 1 /proc/meminfo
fact file-system stat -f -c %T /build
fact directory-order ls -U /in/tree
fact kernel-version uname -r
fact address-layout echo $((0x$(cat /proc/self/personality) & 0x40000))
fact clock date +%Y
fact shell sh -c 'echo ${BASH_VERSION-none}'
fact input-topology stat -c %h /in/tree/a
fact process-ids echo $(($$ / 1000))
fact rest bash -c 'cat /in/tree/*; ls -A /build /out; df -P /out /tmp | tail -n 2 | cut -d" " -f1; ulimit -a'
mkdir "$PWD/a" && cd "$PWD/a" && touch b && rm b && cd /build && rmdir a
echo "it went well" > /out/result
"""


def facts(run: Run) -> dict[str, str]:
    words = (line.split(" ", 2) for line in run.lines if line.startswith("fact "))
    return {name: value for _, name, value in words}


@pytest.fixture(scope="module")
def plain(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A build with nothing varied."""
    bench = Bench(places, tmp_path_factory.mktemp("plain"))
    return bench.run(bench.job(FACTS))


@pytest.mark.parametrize("name", [name for name in VARIED if name != "runtime"])
def test_an_axis_changes_what_it_is_about_and_nothing_else(name: str, bench: Bench, plain: Run) -> None:
    axis = BY_NAME[name]
    job = bench.job(FACTS)
    assert axis.unavailable(bench.places.world, job) is None
    run = bench.run(bench.vary(name, job))
    before, after = facts(plain), facts(run)
    assert {fact for fact in before if before[fact] != after[fact]} == {name}
    assert run.seen is not None and plain.seen is not None
    assert axis.took_effect(plain.seen, run.seen), (axis.seen(plain.seen), axis.seen(run.seen))
    assert run.out == plain.out == {"result": f"{RESULT}\n".encode()}
    others = {other.name for other in AXES if other.vary is not None and other.took_effect(plain.seen, run.seen)}
    assert others == {name}


def test_another_runtime(bench: Bench, plain: Run) -> None:
    axis = BY_NAME["runtime"]
    job = bench.job(FACTS)
    reason = axis.unavailable(bench.places.world, job)
    if reason is not None:
        assert "daemon.json" in reason
        # An engine may list containerd's names of runc as well.
        names = bench.places.world.runtime.runtimes
        assert [name for name in names if not name.startswith("io.containerd.")] == ["runc"]
        pytest.skip(reason)
    run = bench.run(bench.vary("runtime", job))
    assert run.seen is not None and plain.seen is not None
    assert axis.took_effect(plain.seen, run.seen)
    assert facts(run) == facts(plain)


def test_the_observer_is_not_felt(bench: Bench) -> None:
    """The same build with and without it: all that could get into an output by accident is the same."""
    script = "env | sort; pwd; echo $PPID; ls -la /build /out /in /tmp; ulimit -a; ls /; cat /proc/self/cmdline"
    job = bench.job(script)
    bare = replace(bench.job(script), surroundings=sandbox.Surroundings())
    seen, unseen = (
        re.sub(r" [A-Z][a-z]{2} +\d+ \d\d:\d\d ", " ", "\n".join(bench.run(each).lines)) for each in (job, bare)
    )
    assert seen == unseen


def test_all_axes_at_once(bench: Bench, plain: Run) -> None:
    job = bench.job(FACTS)
    used: list[Axis] = [axis for axis in AXES if axis.vary and axis.unavailable(bench.places.world, job) is None]
    for axis in used:
        job = bench.vary(axis.name, job, 1)
    run = bench.run(job)
    assert run.seen is not None and plain.seen is not None
    ineffective = [axis.name for axis in used if not axis.took_effect(plain.seen, run.seen)]
    assert ineffective == []
    before, after = facts(plain), facts(run)
    assert {fact for fact in before if before[fact] == after[fact]} == {"rest"}
    assert run.out == plain.out


PROGRAM = r"""
set -e
echo 'int add(int, int);' > add.h
for n in 1 2 3 4 5 6; do
    echo "#include \"add.h\"
    #include <stdio.h>
    int f$n(int x) { puts(\"f$n\"); return add(x, $n); }" > f$n.c
done
echo '#include "add.h"
int add(int a, int b) { return a + b; }' > add.c
echo 'int f1(int); int main(void) { return f1(41) == 42 ? 0 : 1; }' > main.c
cat > Makefile <<'X'
OBJECTS = f1.o f2.o f3.o f4.o f5.o f6.o add.o main.o
program: $(OBJECTS) ; gcc -o $@ $^
%.o: %.c add.h ; gcc -O2 -c -o $@ $<
X
make -j "$VZ_CORES"
./program
make | grep 'up to date'
tar -c --sort=name --mtime=@1 --owner=0 --group=0 --numeric-owner --mode=u=rw,go=r -f /out/objects.tar *.o
cp program /out/
"""


@pytest.mark.thorough
def test_a_real_build_with_all_axes_at_once(bench: Bench) -> None:
    fields: dict[str, Any] = {"image": bench.places.c_image}
    first = bench.run(bench.job(PROGRAM, **fields))
    job = bench.job(PROGRAM, **fields)
    for axis in AXES:
        if axis.vary and axis.unavailable(bench.places.world, job) is None:
            job = bench.vary(axis.name, job)
    second = bench.run(job)
    assert set(first.out) == {"objects.tar", "program"}
    assert first.out == second.out
    assert not any("lock skew" in line or "warning" in line for line in second.lines)


# --- what is held -------------------------------------------------------------------------------------------------

NOISE = {
    "clock": "date +%N; date; touch f; stat -c %y f; "
    "python3 -c 'import os, time; print(time.time(), os.stat(\"f\").st_mtime_ns)'",
    "randomness": "head -c 16 /dev/urandom | od -An -tx1; head -c 16 /dev/random | od -An -tx1; mktemp; mktemp -d; "
    "python3 -c 'import os, random, tempfile, uuid; print(os.urandom(16).hex(), random.random(), uuid.uuid4(), "
    'hash("x"), tempfile.mkdtemp())\'; bash -c "echo $SRANDOM"; shuf -i 1-100 | tr "\\n" " "',
    "inodes": "mkdir d; touch d/a d/b /out/c; stat -c '%i %n' . d d/a d/b /out /out/c; ls -i d",
    "address-layout": "cut -d' ' -f1 /proc/self/maps; python3 -S -c 'print(id(len))'",
    "process-ids": "echo $$ $PPID; sh -c 'echo $$'; sh -c 'echo $$'",
    "cores": "nproc; echo $VZ_CORES; for i in 1 2 3; do cut -d' ' -f39 /proc/self/stat; done",
}


@pytest.mark.parametrize("name", list(NOISE))
def test_what_is_held_is_the_same_twice(name: str, bench: Bench) -> None:
    axis = BY_NAME[name]
    one, other = (bench.run(bench.hold(name, bench.job(NOISE[name]))) for _ in range(2))
    assert one.lines == other.lines and one.lines
    assert one.seen is not None and other.seen is not None
    assert axis.was_held(one.seen, other.seen), (axis.seen(one.seen), axis.seen(other.seen))
    if name not in {"cores", "inodes", "process-ids"}:  # these may be the same by chance
        free = [bench.run(bench.job(NOISE[name])) for _ in range(2)]
        assert free[0].lines != free[1].lines, "what is compared is noise"
        assert free[0].seen is not None and free[1].seen is not None
        assert not axis.was_held(free[0].seen, free[1].seen)


def test_everything_held_at_once(bench: Bench) -> None:
    script = "; ".join(NOISE.values()) + "; echo $RANDOM; echo $RANDOM > /out/random"
    runs = []
    for _ in range(2):
        job = bench.job(script)
        for name in NOISE:
            job = bench.hold(name, job)
        runs.append(bench.run(job))
    assert runs[0].lines == runs[1].lines
    assert runs[0].out == runs[1].out and "random" in runs[0].out


def test_what_is_in_memory_comes_out_whole(bench: Bench) -> None:
    script = "umask 077; mkdir -p /out/d/e; echo x > /out/d/e/f; ln /out/d/e/f /out/g; ln -s d/e /out/l; touch /out/.h"
    job = bench.hold("inodes", bench.job(f"{script}; chmod 500 /out/d; exit 0"))
    lines: list[str] = []
    sandbox.run(job, on_line=lines.append)
    assert (job.out / "d/e/f").read_text() == "x\n" and (job.out / "g").samefile(job.out / "d/e/f")
    assert (job.out / "l").readlink() == Path("d/e")
    assert sorted(path.name for path in job.out.iterdir()) == [".h", "d", "g", "l"]
    sandbox.discard(job)
    empty = bench.hold("inodes", bench.job("true"))
    assert bench.run(empty).out == {}
    with pytest.raises(BuildFailed, match="exit code 7"):
        bench.run(bench.hold("inodes", bench.job("exit 7")))


def test_a_job_ends_as_it_would_without_the_observer(bench: Bench) -> None:
    for change in (lambda job: job, lambda job: bench.vary("process-ids", job)):
        with pytest.raises(BuildFailed, match="exit code 7"):
            bench.run(change(bench.job("exit 7")))
        with pytest.raises(BuildFailed, match="killed by signal 15"):
            bench.run(change(bench.job("kill -TERM $$")))
        with pytest.raises(BuildFailed, match="exit code 127"):
            bench.run(change(bench.job("", command=("no-such-program",))))


def asked(bench: Bench, change: Callable[[sandbox.Job], sandbox.Job]) -> dict[str, list[str]]:
    """What asks.c prints in a job that is changed like this: first word of a line → the others."""
    source = Path(__file__).with_name("asks.c")
    script = "gcc -O1 -Wall -Werror -o asks /in/asks.c -pthread && ./asks"
    inputs = {"asks.c": source, "tree": bench.places.tree}
    job = change(bench.job(script, image=bench.places.c_image, timeout_secs=120, inputs=inputs))
    return {line.split()[0]: line.split()[1:] for line in bench.run(job).lines}


@pytest.mark.parametrize("how", ["shifted", "frozen", "real"])
def test_the_changed_clock_is_one_clock(how: str, bench: Bench) -> None:
    start = bench.places.world.started
    answers = {
        "shifted": lambda: asked(bench, lambda job: bench.vary("clock", job)),
        "frozen": lambda: asked(bench, lambda job: bench.hold("clock", job)),
        "real": lambda: asked(bench, lambda job: job),
    }[how]()
    shift = {"shifted": 400 * 86400 + 5 * 3600, "frozen": EPOCH + 86400 - start, "real": 0}[how]
    clock = int(answers["clock"][0])
    assert start + shift <= clock < start + shift + 3600
    assert how != "frozen" or clock == EPOCH + 86400
    assert answers["agree"] == ["1"]
    for name in ("new", "copy"):
        assert answers[name][1] == "1" and abs(int(answers[name][0]) - clock) < 120, name
    assert answers["copy"] == answers["new"], "a time that was read and set again means the same"
    assert (answers["old"], answers["input"]) == (["1", "1"], ["1", "1"]), "what is older is left alone"
    assert all(0.15 < float(seconds) < 5 for seconds in answers["waits"]), answers["waits"]


def test_constant_randomness_is_the_same_by_every_way(bench: Bench) -> None:
    one, other = (asked(bench, lambda job: bench.hold("randomness", job)) for _ in range(2))
    free = asked(bench, lambda job: job)
    for answers in (one, other, free):
        status, _, too_many, *_ = answers["random"]
        assert (status, too_many) == ("0", "-1")
        assert answers["names"][:4] == ["1", "1", "1", "-1"]
        assert answers["names"][5].endswith(".suffix")
    assert one["random"] == other["random"] and one["names"] == other["names"]
    assert one["random"][3:5] != free["random"][3:5] and one["names"] != free["names"]
    assert one["random"][-1] == "5a"


# --- hosts --------------------------------------------------------------------------------------------------------


def test_a_host_user_who_is_not_root(places: Places) -> None:
    """Another uid than root's and the sandbox's: results are readable, and everything is removed."""
    sock = Path("/var/run/docker.sock")
    if os.geteuid() != 0 or not sock.exists() or "DOCKER_HOST" in os.environ:
        pytest.skip("needs root, to become someone else, and the local Docker socket")
    home = Path("/var/tmp") / f"vzrepro-test-{uuid.uuid4().hex}"
    home.mkdir(mode=0o700)
    tools = home / "tools"
    shutil.copytree(places.world.tools or "", tools)
    shutil.copytree(places.tree, home / "tree")
    shm = Path(tempfile.mkdtemp(prefix="vzrepro-test-", dir="/dev/shm"))
    (home / "jobs").mkdir()
    for path in (home, home / "jobs", shm, *tools.rglob("*"), tools, home / "tree"):
        os.chown(path, 54321, sock.stat().st_gid)
    mine = replace(places, world=replace(places.world, tools=tools, scratch_shm=shm), tree=home / "tree")
    bench = Bench(mine, home / "jobs")
    closed = "umask 077; mkdir -p /build/a; echo x > /out/f; chmod 0 /build/a /out/f; id -u"
    sandbox.check()  # loads what is imported late, as root: the interpreter may lie in root's home
    for path in ("/bin/sh", "/bin/bash", "/bin/dash", "/etc/passwd", "/etc/group"):
        sandbox.image_file(places.tools_image, path)

    def as_someone_else() -> list[object]:
        together = bench.job(closed)
        for axis in AXES:
            if axis.vary and axis.unavailable(mine.world, together) is None:
                together = bench.vary(axis.name, together)
        results: list[object] = []
        for job in (together, bench.hold("inodes", bench.job(closed))):
            run = bench.run(job)
            results += [run.lines, run.out["f"].decode()]
        return [*results, sorted(path.name for path in (home / "jobs").iterdir()), list(shm.iterdir())]

    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(sock.stat().st_gid)
            os.setuid(54321)
            answer = json.dumps(as_someone_else())
        except BaseException as error:
            answer = json.dumps(repr(error))
        os.write(write_end, answer.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as reader:
        answer = json.loads(reader.read())
    os.waitpid(pid, 0)
    shutil.rmtree(home)
    shutil.rmtree(shm)
    assert answer == [["2001"], "x\n", ["1000"], "x\n", ["log"], []]


def test_the_files_of_an_image(places: Places) -> None:
    passwd = sandbox.image_file(places.tools_image, "/etc/passwd")
    assert passwd is not None and b"builder:x:1000:1000:" in passwd
    shell = sandbox.image_file(places.tools_image, "/bin/sh")
    assert shell is not None and shell.startswith(b"\x7fELF"), "links are followed"
    assert sandbox.image_file(places.tools_image, "/no/such/file") is None
    assert sandbox.image_file(places.tools_image, "/etc") is None
