"""The axes without Docker: what each changes of a job, and only that; when it cannot be had; how it is proven."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzrepro import sandbox
from vzrepro.proof.audit import observed
from vzrepro.proof.audit.axes import AXES
from vzrepro.proof.audit.changes import World, baseline
from vzrepro.sandbox.confine import run_arguments
from vzrepro.sandbox.staging import Mounts

IMAGE = "sha256:" + "ab" * 32
RUNTIME = sandbox.Runtime("docker", "docker", "28", "28", 2, "overlay2", False, 4, 16 << 30, "runc", ("crun", "runc"))
IMAGE_FILES = {
    "/bin/sh": b"\x7fELF dash",
    "/bin/dash": b"\x7fELF dash",
    "/bin/bash": b"\x7fELF bash",
    "/etc/passwd": b"builder:x:1000:1000::/build:/bin/sh\n",
    "/etc/group": b"builder:x:1000:\n",
}
BY_NAME = {axis.name: axis for axis in AXES}
VARIED = [axis.name for axis in AXES if axis.vary is not None]
HELD = [axis.name for axis in AXES if axis.hold is not None]


@pytest.fixture(autouse=True)
def image(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of every image."""
    files = dict(IMAGE_FILES)
    monkeypatch.setattr(sandbox, "has_image", lambda _image: True)
    monkeypatch.setattr(sandbox, "image_file", lambda _image, path: files.get(path))
    return files


@pytest.fixture
def world(tmp_path: Path) -> World:
    tools = tmp_path / "tools"
    (tools / "locale").mkdir(parents=True)
    for name in ("vary", "look", "hold.so", "locale/LC_TIME"):
        (tools / name).write_text(name)
    shm = tmp_path / "shm"
    shm.mkdir(mode=0o700)
    return World(RUNTIME, tools, 2, shm, started=1_800_000_000)


@pytest.fixture
def new_job(tmp_path: Path) -> Callable[..., sandbox.Job]:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "abcdefgh":
        (tree / name).write_text(name)
    counter = itertools.count()

    def make(**changes: Any) -> sandbox.Job:
        scratch = tmp_path / f"scratch{next(counter)}"
        scratch.mkdir(mode=0o700)
        fields: dict[str, Any] = {
            "label": "thing",
            "image": IMAGE,
            "command": ("make", "all"),
            "scratch": scratch,
            "log": tmp_path / "log",
            "source_date_epoch": 1_700_000_000,
            "cores": 2,
            "memory_bytes": 2 << 30,
            "inputs": {"tree": tree},
        }
        return sandbox.Job(**(fields | changes))

    return make


def arguments(job: sandbox.Job) -> list[str]:
    """The container's arguments; a flag and its value as one, the scratch directory and the profile by short names."""
    argv = [word.replace(str(job.scratch), "SCRATCH") for word in run_arguments(job, "name")]
    return [re.sub(r"seccomp=/.*/sandbox/", "seccomp=", word) for word in argv]


def changed(before: sandbox.Job, after: sandbox.Job) -> tuple[set[str], set[str]]:
    """The arguments that are gone and those that are new, without the paths of files mounted."""
    one, other = Counter(arguments(before)), Counter(arguments(after))
    return set((one - other).keys()), set((other - one).keys())


EXPECTED: Mapping[str, tuple[set[str], set[str]]] = {
    "build-path": (
        {"/build"},
        {"/srv/other/deeper/build", "--mount", "type=bind,src=SCRATCH/build,dst=/srv/other/deeper/build"},
    ),
    "host-name": ({"localhost"}, {"other-1", "--domainname", "net1.example"}),
    "user": (
        {"1000:1000"},
        {
            *("2001:3001", "--mount"),
            *(
                f"type=bind,src=SCRATCH/files/{n},dst={to},readonly"
                for n, to in ((2, "/etc/passwd"), (3, "/etc/group"))
            ),
        },
    ),
    "umask": (
        {'umask 022; exec 2>&1 env -i sh -c "$0" sh "$@"'},
        {'umask 077; exec 2>&1 env -i sh -c "$0" sh "$@"'},
    ),
    "time-zone": ({"TZ=UTC"}, {"TZ=EAST-14"}),
    "locale": (
        {"LC_ALL=C.UTF-8"},
        {"LC_ALL=xx_XX.UTF-8", "--mount", "type=bind,src=SCRATCH/files/2,dst=/usr/lib/locale/xx_XX.utf8,readonly"},
    ),
    "home": ({"HOME=/build"}, {"HOME=/tmp/home-1", "--mkdir=/tmp/home-1"}),
    "path": (
        {"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
        {"PATH=/usr/sbin:/usr/bin:/sbin:/bin:/opt/other-1/bin"},
    ),
    "environment": (
        set(),
        {
            *("USER=other1", "LOGNAME=other1", "EMAIL=other1@example.org", "TERM=xterm-256color", "COLUMNS=211"),
            *("CI=true", "BUILD_NUMBER=4711"),
        },
    ),
    "cores": ({"VZ_CORES=2", "2"}, {"VZ_CORES=3", "3", "--cpuset-cpus"}),
    "memory": (
        {str(2 << 30)},
        {str(3 << 30), "--mount", "type=bind,src=SCRATCH/files/2,dst=/proc/meminfo,readonly"},
    ),
    "file-system": (
        {str(2 << 30), "type=bind,src=SCRATCH/build,dst=/build"},
        {str(10 << 30), "type=bind,src=SHM/build,dst=/build"},
    ),
    "directory-order": ({"type=bind,src=SCRATCH/in,dst=/in,readonly"}, {"type=bind,src=SHM/in,dst=/in,readonly"}),
    "kernel-version": ({"seccomp=seccomp.json"}, {"seccomp=SCRATCH/seccomp.json", "--personality=0x20000"}),
    "address-layout": ({"seccomp=seccomp.json"}, {"seccomp=SCRATCH/seccomp.json", "--personality=0x40000"}),
    "clock": (
        set(),
        {
            "--mount",
            "type=bind,src=SCRATCH/files/2,dst=/dev/mqueue/hold.so,readonly",
            "type=bind,src=SCRATCH/files/3,dst=/etc/ld.so.preload,readonly",
            "type=bind,src=SCRATCH/files/4,dst=/dev/mqueue/hold,readonly",
        },
    ),
    "shell": (set(), {"--mount", "type=bind,src=SCRATCH/files/2,dst=/bin/sh,readonly"}),
    "input-topology": (set(), set()),
    "process-ids": (set(), {"--pid=2000"}),
    "runtime": (set(), {"--runtime", "crun"}),
}


def varied(name: str, job: sandbox.Job, world: World, count: int = 0) -> sandbox.Job:
    vary = BY_NAME[name].vary
    assert vary is not None
    return vary(job, world, count)


def held(name: str, job: sandbox.Job, world: World) -> sandbox.Job:
    hold = BY_NAME[name].hold
    assert hold is not None
    return hold(job, world)


@pytest.mark.parametrize("name", VARIED)
def test_an_axis_changes_its_own_arguments_and_no_others(
    name: str, new_job: Callable[..., sandbox.Job], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    job = baseline(new_job(), world)
    gone, new = changed(job, varied(name, job, world))
    places = rf"{re.escape(str(world.scratch_shm))}/[0-9a-f]{{16}}"
    new = {re.sub(places, "SHM", word) for word in new}
    cpus = {word for word in new if re.fullmatch(r"\d(,\d)*", word) and name == "cores" and "," in word}
    assert (gone, new - cpus) == EXPECTED[name]
    if name == "cores":
        assert [len(word.split(",")) for word in cpus] == [RUNTIME.cpus - 1]


@pytest.mark.parametrize("name", VARIED)
def test_another_round_has_other_values(name: str, new_job: Callable[..., sandbox.Job], world: World) -> None:
    one_way = {"kernel-version", "address-layout", "shell", "input-topology", "runtime", "file-system"}
    job = baseline(new_job(), world)
    rounds = [varied(name, job, world, count) for count in range(3)]
    assert (rounds[0] == rounds[1] == rounds[2]) == (name in one_way)
    if name not in one_way:
        assert rounds[0] != rounds[1] != rounds[2]


def test_the_baseline_adds_the_observer_and_nothing_else(new_job: Callable[..., sandbox.Job], world: World) -> None:
    job = new_job()
    assert changed(job, baseline(job, world)) == (
        set(),
        {
            *("--mount", "/dev/mqueue/vary", "--look=/dev/mqueue/look", "--"),
            "type=bind,src=SCRATCH/files/0,dst=/dev/mqueue/vary,readonly",
            "type=bind,src=SCRATCH/files/1,dst=/dev/mqueue/look,readonly",
        },
    )
    assert arguments(baseline(job, world))[-5:] == [
        *("/dev/mqueue/vary", "--look=/dev/mqueue/look", "--"),
        *job.command,
    ]


def test_without_the_tools_nothing_is_changed_and_nothing_available(
    new_job: Callable[..., sandbox.Job], world: World
) -> None:
    for job, here, why in (
        (new_job(), replace(world, tools=None), "audit-tools is not there"),
        (new_job(platform="linux/arm64"), world, "linux/arm64"),
    ):
        assert baseline(job, here) == job
        assert all(why in (axis.unavailable(here, job) or "") for axis in AXES)


def test_all_axes_together(new_job: Callable[..., sandbox.Job], world: World) -> None:
    job = baseline(new_job(), world)
    together = job
    for name in VARIED:
        together = varied(name, together, world)
    words = {re.sub(r"files/\d+", "files/N", word) for word in arguments(together)}
    # Each asks for more memory; /build is in memory at both of its places.
    combined = {str(3 << 30), str(10 << 30), "type=bind,src=SCRATCH/build,dst=/srv/other/deeper/build"}
    for name in VARIED:
        alone = {re.sub(r"files/\d+", "files/N", word) for word in changed(job, varied(name, job, world))[1]}
        assert alone - words <= combined, name
    assert str(11 << 30) in words
    assert f"type=bind,src={together.build},dst=/srv/other/deeper/build" in words
    assert (together.surroundings.personality, together.surroundings.staging) == (0x60000, "copy")
    assert "".join(together.surroundings.prefix).startswith("/dev/mqueue/vary--pid=2000--personality=0x40000")


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("time-zone", {"env": {"TZ": "UTC"}}, "the recipe sets TZ itself"),
        ("locale", {"env": {"LC_ALL": "C"}}, "the recipe sets LC_ALL itself"),
        ("home", {"env": {"HOME": "/tmp"}}, "the recipe sets HOME itself"),
        ("input-topology", {"inputs": {}}, "no inputs"),
        ("directory-order", {"inputs": {}}, "no directory below /in has two entries"),
    ],
)
def test_what_a_job_cannot_have(
    name: str, changes: dict[str, Any], why: str, new_job: Callable[..., sandbox.Job], world: World
) -> None:
    axis = BY_NAME[name]
    assert axis.unavailable(world, new_job()) is None
    assert why in (axis.unavailable(world, new_job(**changes)) or "")


def test_what_a_host_cannot_do(
    new_job: Callable[..., sandbox.Job], world: World, image: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job()
    assert not {axis.name for axis in AXES if axis.unavailable(world, job)}
    plain = replace(world, scratch_shm=None, runtime=replace(RUNTIME, runtimes=("io.containerd.runc.v2", "runc")))
    assert {axis.name for axis in AXES if axis.unavailable(plain, job)} == {
        *("file-system", "directory-order", "runtime"),
    }
    far = replace(world, unmounted="it does not see this machine's files")
    why = {axis.name: axis.unavailable(far, job) for axis in AXES if axis.unavailable(far, job)}
    told = "the container engine mounts no directory of this host: it does not see this machine's files"
    assert why == dict.fromkeys(("file-system", "directory-order"), told)
    reason = BY_NAME["runtime"].unavailable(plain, job) or ""
    assert "no other OCI runtime than runc" in reason and "apt-get install crun" in reason and "kill -HUP" in reason
    del image["/bin/bash"]
    assert "no second shell" in (BY_NAME["shell"].unavailable(world, job) or "")
    monkeypatch.setattr(sandbox, "has_image", lambda _image: False)  # not loaded yet: nobody can tell
    assert BY_NAME["shell"].unavailable(world, job) is None


def test_inputs_that_do_not_fit_into_memory(
    new_job: Callable[..., sandbox.Job], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(world.scratch_shm or "/")
    small = os.statvfs_result((*real[:1], 1, *real[2:3], 8, 8, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _path: small)
    assert "too much for the memory" in (BY_NAME["directory-order"].unavailable(world, new_job()) or "")


def test_the_shell_that_is_not_there_already(
    new_job: Callable[..., sandbox.Job], world: World, image: dict[str, bytes]
) -> None:
    job = baseline(new_job(), world)
    assert varied("shell", job, world).surroundings.files["/bin/sh"] == b"\x7fELF bash"
    image["/bin/sh"] = image["/bin/bash"]
    assert varied("shell", job, world).surroundings.files["/bin/sh"] == b"\x7fELF dash"


def test_another_user_has_a_name(new_job: Callable[..., sandbox.Job], world: World, image: dict[str, bytes]) -> None:
    job = varied("user", baseline(new_job(), world), world, 1)
    assert job.user == (2002, 3002)
    passwd = job.surroundings.files["/etc/passwd"]
    assert isinstance(passwd, bytes)
    assert passwd.startswith(IMAGE_FILES["/etc/passwd"]) and b"other2:x:2002:3002:" in passwd
    del image["/etc/passwd"], image["/etc/group"]
    assert "/etc/passwd" not in varied("user", baseline(new_job(), world), world).surroundings.files


def test_settings_of_two_axes_are_one_file(new_job: Callable[..., sandbox.Job], world: World) -> None:
    settings = "/dev/mqueue/hold"
    job = baseline(new_job(), world)
    assert varied("clock", job, world).surroundings.files[settings] == b"shift 34578000 1800000000\n"
    both = held("randomness", held("clock", job, world), world)
    assert both.surroundings.files[settings] == b"freeze 1700086400 1800000000\nrandom\n"
    assert both.surroundings.files["/dev/urandom"] == both.surroundings.files["/dev/random"]


def test_what_is_held_is_the_same_in_every_build(new_job: Callable[..., sandbox.Job], world: World) -> None:
    assert HELD == ["cores", "address-layout", "clock", "process-ids", "randomness", "inodes"]
    jobs = []
    for _ in range(2):
        job = baseline(new_job(), world)
        for name in HELD:
            job = held(name, job, world)
        jobs.append(job)
    assert arguments(jobs[0]) == arguments(jobs[1])
    assert jobs[0].surroundings == jobs[1].surroundings
    assert (jobs[0].cores, jobs[0].surroundings.in_memory) == (1, True)
    tmpfs = {word.partition(":")[0] for word in arguments(jobs[0]) if ",mode=777,uid=1000,gid=1000" in word}
    assert tmpfs == {"/build", "/out"}


# --- what was observed --------------------------------------------------------------------------------------------

SEEN = {
    "pid": "8",
    "personality": "0",
    "stack": "0x7fff1",
    "time": "1795552262.902263953",
    "build": "ef53",
    "inode": "7",
    "environment": "6:0123456789abcdef",
}


def test_only_the_observers_line_is_read() -> None:
    assert observed.parse(f"vzrepro-observed {json.dumps(SEEN)}") == SEEN
    for line in ("", "make: nothing to be done", "vzrepro-observed", "vzrepro-observed {", "vzrepro-observed [1]"):
        assert observed.parse(line) is None


@pytest.mark.parametrize(
    ("name", "changes", "effective"),
    [
        ("process-ids", {"pid": "1008"}, True),
        ("process-ids", {"pid": "12"}, False),
        ("address-layout", {"personality": "40000", "stack": "0x7ffe0"}, True),
        ("address-layout", {"stack": "0x7ffe0"}, False),
        ("clock", {"time": "1835552022.125782232"}, True),
        ("clock", {"time": "1795552299.0"}, False),
        ("file-system", {"build": "1021994"}, True),
        ("environment", {"environment": "6:fedcba9876543210"}, False),
        ("environment", {"environment": "13:fedcba9876543210"}, True),
        ("host-name", {"host": "other", "domain": "(none)"}, False),
    ],
)
def test_when_an_axis_took_effect(name: str, changes: dict[str, str], effective: bool) -> None:
    assert BY_NAME[name].took_effect(SEEN, {**SEEN, **changes}) is effective


SAID = st.text(st.sampled_from("0123456789.-xabcdef:é "), max_size=8) | st.sampled_from(
    ["9" * 5000, "9" * 18, "-1.0", ""]
)


@given(st.dictionaries(st.sampled_from(sorted(SEEN)), SAID), st.sets(st.sampled_from(sorted(SEEN))))
def test_whatever_a_builder_pretends_to_have_seen_is_text_or_nothing(said: dict[str, str], gone: set[str]) -> None:
    seen = {name: value for name, value in {**SEEN, **said}.items() if name not in gone}
    for axis in AXES:
        found = axis.seen(seen)
        assert found is None or isinstance(found, str)
        assert axis.took_effect(SEEN, seen) in (True, False)


def test_when_an_axis_was_held() -> None:
    later = {**SEEN, "time": "1795552262.902263954", "stack": "0x7fff2"}
    assert BY_NAME["inodes"].was_held(SEEN, later) and BY_NAME["inodes"].seen(SEEN) == "7 on ext4"
    assert not BY_NAME["clock"].was_held(SEEN, later) and not BY_NAME["address-layout"].was_held(SEEN, later)
    assert not BY_NAME["randomness"].was_held(SEEN, SEEN), "nothing was seen of it"


def test_the_words_for_people(new_job: Callable[..., sandbox.Job]) -> None:
    names = [axis.name for axis in AXES]
    assert len(set(names)) == len(names) and all(re.fullmatch("[a-z]+(-[a-z]+)*", name) for name in names)
    for axis in AXES:
        assert axis.vary or axis.hold
        assert all(text and text[-1] != "." and "\n" not in text for text in (axis.about, axis.applied, axis.proof))
    assert BY_NAME["clock"].seen(SEEN) == "2026-11-24T20:31:02.902263953Z"


# --- the surroundings in the sandbox ------------------------------------------------------------------------------


def test_surroundings_are_staged_and_removed(new_job: Callable[..., sandbox.Job], world: World) -> None:
    job = baseline(new_job(), world)
    for name in ("host-name", "file-system", "directory-order", "input-topology", "kernel-version", "locale"):
        job = varied(name, job, world)
    Mounts(job).fill(lambda: None)
    assert world.scratch_shm is not None and job.build.is_relative_to(world.scratch_shm)
    assert job.build.parent.stat().st_mode & 0o7777 == 0o700
    assert sorted(path.name for path in (job.staged / "tree").iterdir()) == list("abcdefgh")
    assert {path.stat().st_nlink for path in (job.staged / "tree").iterdir()} == {1}
    assert (job.scratch / "etc" / "hostname").read_text() == "other-1\n"
    assert "127.0.1.1\tother-1.net1.example\tother-1\n" in (job.scratch / "etc" / "hosts").read_text()
    assert (job.scratch / "files" / "2" / "LC_TIME").read_text() == "locale/LC_TIME"
    sandbox.discard(job)
    assert not job.scratch.exists() and list(world.scratch_shm.iterdir()) == []


def test_the_profile_of_an_audit_permits_one_personality_more(
    new_job: Callable[..., sandbox.Job], world: World
) -> None:
    job = varied("address-layout", varied("kernel-version", baseline(new_job(), world), world), world)
    Mounts(job).fill(lambda: None)
    ours = json.loads(Path(sandbox.__file__).with_name("seccomp.json").read_text())
    theirs = json.loads((job.scratch / "seccomp.json").read_text())
    *rules, added = theirs.pop("syscalls")
    assert rules == ours.pop("syscalls") and theirs == ours
    assert added == {
        "names": ["personality"],
        "args": [{"index": 0, "value": 0x60000, "op": "SCMP_CMP_EQ"}],
        "action": "SCMP_ACT_ALLOW",
    }


def test_a_tmpfs_of_the_container_is_at_one_place(new_job: Callable[..., sandbox.Job], world: World) -> None:
    with pytest.raises(ValueError, match="one place"):
        sandbox.Surroundings(in_memory=True, workdir="/elsewhere")
    with pytest.raises(ValueError, match="one place"):
        varied("build-path", held("inodes", baseline(new_job(), world), world), world)


def test_inputs_are_made_in_an_order_of_the_seed(
    new_job: Callable[..., sandbox.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = os.link
    monkeypatch.setattr(os, "link", lambda source, target: (made.append(Path(target).name), real(source, target)))
    orders = []
    for seed in (1, 1, 2):
        made.clear()
        Mounts(new_job(surroundings=sandbox.Surroundings(order=seed))).fill(lambda: None)
        orders.append(list(made))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) == list("abcdefgh")
