"""Installing a bundle under kill -9 at every step, with readers and other installers at work, and on bad disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bundles import CONTENT, make_bundle
from tests.crashing import Doom, ended, forked
from vzrepro.base import disk
from vzrepro.base.errors import VzreproError
from vzrepro.guest.bundle import Installation, KernelBundleOptions, KernelProfile, examine, export, install, resolve

root_on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounting needs root on Linux"
)
STEPS = 200
"""More than an installation has."""


def die_at(step: int, *, exchange: bool) -> None:
    """Have this process killed before or after its n-th call that changes the disk."""
    doom = Doom(step)

    for owner, names in (
        (Path, ("mkdir", "rename", "chmod", "open")),
        (disk, ("sync_trees", "sync", "exchange", "remove_tree", "try_lock")),
        (os, ("unlink", "rmdir")),
    ):
        for name in names:
            setattr(owner, name, doom.counted(getattr(owner, name)))
    if not exchange:
        disk.exchange = doom.counted(lambda one, other: False)


def left_behind(parent: Path, target: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path != target)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", ["nothing", "older", "damaged"])
def test_killed_at_any_step(memory: Path, before: str, exchange: bool) -> None:
    """What is there is the old one or the new one; the next installation succeeds and cleans up."""
    new = examine(make_bundle(memory / "new", "container", kernel="new"))
    killed = 0
    seen = set()
    for step in range(STEPS):
        target = memory / str(step) / "container"
        target.parent.mkdir()
        if before != "nothing":
            make_bundle(target, "container", kernel="old")
        if before == "damaged":
            (target / "youki").write_bytes(b"damaged")

        def work(step: int = step, target: Path = target) -> None:
            die_at(step, exchange=exchange)
            install(new, target)

        code = ended(forked(work))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        if not target.exists():
            # Without an exchange there is a moment between two renames.
            assert before == "nothing" or not exchange
            seen.add("nothing")
        elif before == "damaged" and (target / "youki").read_bytes() == b"damaged":
            seen.add("damaged")
        else:
            seen.add(examine(target).metadata.kernel)
        install(new, target)
        assert examine(target).digests == new.digests
        assert left_behind(target.parent, target) == []
    else:
        pytest.fail("the installation never came to its end")
    assert killed > 20
    assert {"nothing": "nothing", "older": "old", "damaged": "damaged"}[before] in seen
    assert "new" in seen


@pytest.mark.parametrize(
    "before", ["older", *(pytest.param(before, marks=pytest.mark.thorough) for before in ("nothing", "damaged"))]
)
def test_killed_at_any_step_where_profiles_lie_in_it(memory: Path, before: str) -> None:
    """As ~/.vz/linux: the developer's own directory and the files for older hosts are each the old ones or the new
    ones; of the files there may be none that count, but never some of both. The other profile is not touched."""
    new = examine(make_bundle(memory / "new", kernel="new", content={"youki": b"new"}))
    killed = 0
    seen = set()
    for step in range(STEPS):
        linux = memory / str(step)
        container = examine(make_bundle(linux / "container", "container")).digests
        (linux / "mine").write_text("precious")
        if before != "nothing":
            for place in (linux, linux / "developer"):
                make_bundle(place, kernel="old")
        if before == "damaged":
            (linux / "youki").write_bytes(b"damaged")

        def work(step: int = step, linux: Path = linux) -> None:
            die_at(step, exchange=True)
            install(new, linux / "developer", linux)

        code = ended(forked(work))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        if (linux / "developer").exists():
            assert examine(linux / "developer").metadata.kernel in ("old", "new")
        else:
            assert before == "nothing"
        try:
            seen.add(examine(linux).metadata.kernel)
        except VzreproError as error:
            # Without version.json no host takes it; that one is there only with the files that it is about.
            assert (linux / "version.json").exists() == (before == "damaged" and "youki is damaged" in str(error))
            seen.add("damaged" if (linux / "version.json").exists() else "none")
        install(new, linux / "developer", linux)
        assert examine(linux).digests == examine(linux / "developer").digests == new.digests
        assert examine(linux / "container").digests == container
        assert sorted(path.name for path in linux.iterdir()) == sorted(["container", "developer", "mine", *new.digests])
        assert (linux / "mine").read_text() == "precious"
    else:
        pytest.fail("the installation never came to its end")
    assert killed > 40
    assert (
        seen
        == {"nothing": {"none", "new"}, "older": {"old", "none", "new"}, "damaged": {"damaged", "none", "new"}}[before]
    )


@contextmanager
def reading(target: Path) -> Iterator[Callable[[], tuple[int, list[str]]]]:
    """Examine `target` again and again meanwhile; afterwards, how often, and what was wrong with it."""
    stop = threading.Event()
    count, faults = 0, []

    def read() -> None:
        nonlocal count
        while not stop.is_set():
            try:
                examine(target)
                if missing := [name for name in (*CONTENT, "version.json") if not (target / name).exists()]:
                    faults.append(f"missing: {missing}")
            except VzreproError as error:
                faults.append(error.in_a_line)
            count += 1

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield lambda: (count, faults)
    finally:
        stop.set()
        thread.join()


INSTALLER = """
import sys
from pathlib import Path
from vzrepro.guest.bundle import examine, install
linux, *sources = map(Path, sys.argv[1:])
bundles = [examine(source) for source in sources]
print("ready", flush=True)
sys.stdin.readline()
while True:
    for bundle in bundles:
        install(bundle, linux / "developer", linux)
"""


@pytest.mark.thorough
def test_a_reader_never_sees_half_while_installers_are_killed(memory: Path) -> None:
    linux = memory / "home"
    target = linux / "developer"
    sources = [make_bundle(memory / name, content={"vmlinux": name.encode() * 5000}) for name in "ab"]
    install(examine(sources[0]), target, linux)
    command = [sys.executable, "-c", INSTALLER, str(linux)]
    with reading(target) as read, reading(linux) as read_legacy:
        for number in range(8):
            both = [
                subprocess.Popen([*command, *map(str, order)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                for order in (sources, sources[::-1])
            ]
            try:
                for process in both:
                    assert process.stdout is not None
                    assert process.stdout.readline() == b"ready\n"
                for process in both:
                    assert process.stdin is not None
                    process.stdin.write(b"\n")
                    process.stdin.close()
                time.sleep(0.02 + 0.017 * number)
            finally:
                for process in both:
                    process.kill()
                    process.wait()
                    assert process.stdout is not None
                    process.stdout.close()
        count, faults = read()
        legacy_count, legacy_faults = read_legacy()
    assert faults == []
    assert min(count, legacy_count) > 20
    # While the files are renamed there is no bundle; what there is of one is never damaged.
    assert [fault for fault in legacy_faults if "it lacks " not in fault and "missing: " not in fault] == []
    last = examine(make_bundle(memory / "last", kernel="last"))
    assert install(last, target, linux) is Installation.REPLACED
    assert sorted(path.name for path in linux.iterdir()) == sorted(["developer", *last.digests])


def test_eight_installers_at_once(memory: Path) -> None:
    sources = [examine(make_bundle(memory / str(n), "container", kernel=f"6.12.{n % 2}")) for n in range(8)]
    target = memory / "home" / ".vz/linux/container"
    gate = os.pipe()

    def work(number: int) -> None:
        os.close(gate[1])
        os.read(gate[0], 1)  # until the parent closes its end
        assert install(sources[number], target) in Installation
        examine(target)

    children = [forked(lambda number=number: work(number)) for number in range(8)]  # type: ignore[misc]
    os.close(gate[0])
    os.close(gate[1])
    assert [ended(child) for child in children] == [0] * 8
    assert examine(target).metadata.kernel in ("6.12.0", "6.12.1")
    assert left_behind(target.parent, target) == []


def test_installers_of_everything_at_once(memory: Path) -> None:
    """Into one profile's directory, the other's, and, by name, into the one that both lie in, of which nothing is
    there yet."""
    linux = memory / "home" / ".vz/linux"
    developer = examine(make_bundle(memory / "d"))
    container = examine(make_bundle(memory / "c", "container"))
    legacy = examine(make_bundle(memory / "l", kernel="legacy"))
    works: list[Callable[[], object]] = [
        lambda: install(developer, linux / "developer", linux),
        lambda: install(container, linux / "container"),
        lambda: install(legacy, linux),
    ]
    gate = os.pipe()

    def work(number: int) -> None:
        os.close(gate[1])
        os.read(gate[0], 1)  # until the parent closes its end
        works[number % 3]()

    children = [forked(lambda number=number: work(number)) for number in range(9)]  # type: ignore[misc]
    os.close(gate[0])
    os.close(gate[1])
    assert [ended(child) for child in children] == [0] * 9
    assert sorted(path.name for path in linux.iterdir()) == sorted(["container", "developer", *developer.digests])
    assert examine(linux / "developer").digests == developer.digests
    assert examine(linux / "container").digests == container.digests
    assert examine(linux).digests in (developer.digests, legacy.digests)


def test_the_same_bundle_is_installed_once_by_eight(memory: Path) -> None:
    source = examine(make_bundle(memory / "source", "container"))
    target = memory / "home" / "container"
    results = memory / "results"
    results.mkdir()

    def work(number: int) -> None:
        (results / str(number)).write_text(install(source, target))

    children = [forked(lambda number=number: work(number)) for number in range(8)]  # type: ignore[misc]
    assert [ended(child) for child in children] == [0] * 8
    assert sorted(path.read_text() for path in results.iterdir()) == ["new", *["present"] * 7]


@root_on_linux
def test_a_full_disk(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted("size=256k")
    make_bundle(place / "container", "container", content={"vmlinux": b"old"})
    (place / "container/youki").write_bytes(b"damaged")
    big = make_bundle(tmp_path / "big", "container", content={"vmlinux": os.urandom(300_000)})
    options = KernelBundleOptions(KernelProfile.CONTAINER, install_dir=place / "container", bundle_dir=big)
    with pytest.raises(VzreproError, match=r"cannot be installed in .*\n.*No space left on device") as caught:
        resolve(options)
    assert "--install-dir" in (caught.value.hint or "")
    assert left_behind(place, place / "container") == []
    assert (place / "container/vmlinux").read_bytes() == b"old"
    with pytest.raises(VzreproError, match="No space left on device"):
        export(big, "1", place / "out")
    assert list((place / "out").iterdir()) == []


@root_on_linux
def test_a_disk_that_has_room_for_one_copy_alone(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    """Then the other one is not changed either."""
    place = mounted("size=512k")
    for directory in (place, place / "developer"):
        make_bundle(directory, kernel="old", content={"vmlinux": b"old"})
    big = examine(make_bundle(tmp_path / "big", content={"vmlinux": os.urandom(300_000)}))
    with pytest.raises(VzreproError, match=r"cannot be installed in .*\n.*No space left on device"):
        install(big, place / "developer", place)
    assert sorted(path.name for path in place.iterdir()) == sorted(["developer", *big.digests])
    assert examine(place).metadata.kernel == examine(place / "developer").metadata.kernel == "old"


@root_on_linux
def test_a_read_only_disk(tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted("size=1m")
    good = make_bundle(tmp_path / "good", "container")
    options = KernelBundleOptions(KernelProfile.CONTAINER, install_dir=place / "container", bundle_dir=good)
    resolve(options)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert resolve(options).done is Installation.PRESENT  # nothing needs to be written
    make_bundle(good, "container", kernel="newer")
    with pytest.raises(VzreproError, match=r"cannot be installed in .*\n.*Read-only file system"):
        resolve(options)
    assert left_behind(place, place / "container") == []
    assert json.loads((place / "container/version.json").read_text())["kernel"] == "6.12.107"


@root_on_linux
def test_a_directory_of_somebody_else() -> None:
    """As a user who may read there, but not write; in a directory that every user can reach."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        good = examine(make_bundle(Path(directory) / "good", "container"))
        home = Path(directory) / "home"
        target = make_bundle(home / "container", "container", kernel="theirs")

        def work() -> None:
            os.setuid(65534)
            assert examine(target).metadata.kernel == "theirs"
            with pytest.raises(VzreproError, match=r"cannot be installed in .*\n.*Permission denied"):
                install(good, target)

        assert ended(forked(work)) == 0
        assert left_behind(home, target) == []
        assert examine(target).metadata.kernel == "theirs"
