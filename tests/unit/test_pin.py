"""What `lock` decides: what is kept, what is resolved, what `--check` finds, what moved."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Workspace
from vzrepro.base.errors import HashMismatch, Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.realize.pin import MovedPin, Pinner, check, failure, moves
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import CrateSetPin, ImagePin, Lock, PinnedFile, SourcePin
from vzrepro.sources import crates, fetch

RECIPES = """
from vzrepro import build, debian_image, debian_source
TOOLS = debian_image("tools", suite="trixie", packages=["dash"])
S = debian_source("thing", series="1", suite="trixie")
build("a", image=TOOLS, command=["x"], inputs={"s": S})
"""


class Resolver(Pinner):
    """A Pinner whose index has one answer; it counts what it was asked."""

    asked: list[str]

    def _source(self, want: Want) -> SourcePin:
        self.asked.append(want.name)
        return SourcePin(want.request, "1.1", PinnedFile("mirror://debian/thing", FileHash.of(b"1.1"), 1))

    def _image(self, want: Want) -> ImagePin:
        self.asked.append(want.name)
        return ImagePin(want.request, "20260101T000000Z", ())


def _resolver(root: Path, update: tuple[str, ...] | None = ()) -> Resolver:
    pinner = Resolver(
        root=root,
        platform="linux/amd64",
        mirrors=fetch.Mirrors({}),
        keyring=root / "none",
        downloads=root / "downloads",
        now=dt.datetime.now(dt.UTC),
        update=update,
    )
    pinner.asked = []
    return pinner


def test_resolves_what_is_missing_and_keeps_what_answers(workspace: Workspace) -> None:
    root = workspace(a=RECIPES)
    first = _resolver(root)
    lock = first.resolve(Lock())
    assert sorted(first.asked) == ["thing", "tools"]
    again = _resolver(root)
    assert again.resolve(lock) == lock
    assert again.asked == []
    evaluate(root, lock, "linux/amd64")


def test_a_changed_request_is_resolved_again(workspace: Workspace) -> None:
    root = workspace(a=RECIPES)
    lock = _resolver(root).resolve(Lock())
    workspace(a=RECIPES.replace('"dash"', '"dash", "sed"'))
    with pytest.raises(UsageError, match="out of date for image 'tools'"):
        evaluate(root, lock, "linux/amd64")
    pinner = _resolver(root)
    evaluate(root, pinner.resolve(lock), "linux/amd64")
    assert pinner.asked == ["tools"]


def test_update_moves_what_is_named(workspace: Workspace) -> None:
    root = workspace(a=RECIPES)
    lock = _resolver(root).resolve(Lock())
    pin = dataclasses.replace(lock.sources["thing"], version="1.0")
    old = Lock({"thing": pin}, lock.images, lock.crate_sets)
    pinner = _resolver(root, ("thing",))
    new = pinner.resolve(old)
    assert pinner.asked == ["thing"]
    assert moves(old, new) == [MovedPin("source thing", "1.0", "1.1")]
    everything = _resolver(root, None)
    everything.resolve(old)
    assert sorted(everything.asked) == ["thing", "tools"]
    with pytest.raises(UsageError, match="nothing called 'thin' is pinned"):
        _resolver(root, ("thin",)).resolve(old)


def test_what_nothing_asks_for_is_dropped(workspace: Workspace) -> None:
    root = workspace(a=RECIPES)
    lock = _resolver(root).resolve(Lock())
    stale = Lock({**lock.sources, "old": lock.sources["thing"]}, lock.images, lock.crate_sets)
    assert _resolver(root).resolve(stale) == lock


def test_check_is_exact(workspace: Workspace) -> None:
    root = workspace(a=RECIPES)
    lock = _resolver(root).resolve(Lock())
    wants = evaluate(root, lock, "linux/amd64").wants
    assert check(wants, lock, "linux/amd64") == []
    assert "image tools is not pinned" in check(wants, Lock(lock.sources), "linux/amd64")[0]
    assert "no recipe asks for it" in check(wants[:1], lock, "linux/amd64")[0]
    other = Lock({"thing": dataclasses.replace(lock.sources["thing"], request="0" * 64)}, lock.images)
    assert "pinned for another request" in check(wants, other, "linux/amd64")[0]


def test_other_platforms_stay(workspace: Workspace) -> None:
    root = workspace(a=RECIPES)
    lock = _resolver(root).resolve(Lock())
    arm = Lock(lock.sources, {**lock.images, ("tools", "linux/arm64"): lock.images["tools", "linux/amd64"]})
    assert _resolver(root).resolve(arm) == arm


def test_an_error_names_the_recipe(workspace: Workspace) -> None:
    root = workspace(a=RECIPES)

    class Failing(Resolver):
        def _source(self, want: Want) -> SourcePin:
            raise UsageError("no such package")

    pinner = Failing(root, "linux/amd64", fetch.Mirrors({}), root, root, dt.datetime.now(dt.UTC))
    pinner.asked = []
    pinner.resolve(Lock())
    (failed,) = pinner.unpinned
    assert failure([failed]) is failed.error
    assert isinstance(failed.error, UsageError)
    assert failed.error.message == "recipes/a/__init__.py:4: no such package"


PROGRAMS = """
from vzrepro import cargo_crates, crate_source
P = crate_source("prog", series="1")
Q = crate_source("quit", series="1")
R = crate_source("rest", series="1")
cargo_crates("prog", lock=P, targets=["x"])
cargo_crates("rest", lock=R, targets=["x"])
"""


class Partial(Resolver):
    """A resolver that fails as `failing` says."""

    failing: dict[str, VzreproError]

    def _source(self, want: Want) -> SourcePin:
        if (error := self.failing.get(want.name)) is not None:
            raise error
        return super()._source(want)

    def _crate_set(self, want: Want) -> CrateSetPin:
        self.asked.append(f"crates {want.name}")
        return CrateSetPin(want.request, ())


def _partial(root: Path, update: tuple[str, ...] | None = (), **failing: VzreproError) -> Partial:
    pinner = Partial(root, "linux/amd64", fetch.Mirrors({}), root, root, dt.datetime.now(dt.UTC), update)
    pinner.asked, pinner.failing = [], failing
    return pinner


def test_pins_that_can_be_made_are_kept(workspace: Workspace) -> None:
    root = workspace(a=PROGRAMS)
    pinner = _partial(root, prog=HashMismatch("another file"), quit=RemoteError("no answer"))
    lock = pinner.resolve(Lock())
    assert (list(lock.sources), list(lock.crate_sets)) == (["rest"], ["rest"])
    error = failure(pinner.unpinned)
    assert isinstance(error, HashMismatch)  # the first one's exit code
    assert error.message == "3 pins could not be made"
    told = ["crate-source prog: another file", "crate-source quit: no answer", "crates prog: not tried"]
    assert (error.reason or "").splitlines() == told
    # What is there is not made again, and what failed is.
    again = _partial(root)
    whole = again.resolve(lock)
    assert (again.asked, failure(again.unpinned)) == (["prog", "quit", "crates prog"], None)
    evaluate(root, whole, "linux/amd64")


def test_a_pin_that_cannot_be_moved_stays(workspace: Workspace) -> None:
    root = workspace(a=PROGRAMS)
    whole = _partial(root).resolve(Lock())
    older = {name: dataclasses.replace(pin, version="1.0") for name, pin in whole.sources.items()}
    before = Lock(older, {}, whole.crate_sets)
    pinner = _partial(root, None, prog=UsageError("gone"))
    after = pinner.resolve(before)
    assert moves(before, after) == [MovedPin("source quit", "1.0", "1.1"), MovedPin("source rest", "1.0", "1.1")]
    assert after.crate_sets == before.crate_sets


def test_without_a_network_not_everything_is_tried(workspace: Workspace) -> None:
    root = workspace(a=PROGRAMS)
    down = dict.fromkeys(("prog", "quit", "rest"), RemoteError("no answer"))
    pinner = _partial(root, **down)
    assert pinner.resolve(Lock()) == Lock()
    assert [each.error is None for each in pinner.unpinned] == [False, False, True, True, True]
    # A server that says that it has no such file has answered.
    gone = _partial(root, **dict.fromkeys(("prog", "quit", "rest"), fetch.NotFound("no place has it")))
    gone.resolve(Lock())
    assert [each.error is None for each in gone.unpinned] == [False, False, False, True, True]


def test_an_interrupt_is_none_of_them(workspace: Workspace) -> None:
    with pytest.raises(Interrupted):
        _partial(workspace(a=PROGRAMS), prog=Interrupted("stopped")).resolve(Lock())


def _crate(series: str, *lines: str) -> str:
    """The version of crate `c` that `series` gives, of an index with these lines."""

    class Indexed(Pinner):
        def _get(self, url: str, max_size: int = 0) -> bytes:
            assert url.endswith("/1/c")
            return "\n".join(lines).encode()

        def _download(self, wave: Sequence[crates.Crate]) -> None:
            for crate in wave:
                (self.downloads / crate.sha256.hex).touch()

    with tempfile.TemporaryDirectory() as folder:
        pinner = Indexed(Path(), "linux/amd64", fetch.Mirrors({}), Path(), Path(folder), dt.datetime.now(dt.UTC))
        return pinner._source(Want("crate-source", "c", "here", {"series": series})).version


def _line(version: str, yanked: bool = False) -> str:
    return json.dumps({"name": "c", "vers": version, "cksum": "0" * 64, "yanked": yanked, "v": 2})


@pytest.mark.parametrize(
    ("series", "version"),
    [
        ("0.18", "0.18.10+1.9.7"),
        ("0.18.8", "0.18.8+1.9.10"),
        ("0.18.8+1.9.7", "0.18.8+1.9.7"),
        ("0.1", "0.1.9"),
        ("4.0.0-rc.1", "4.0.0-rc.1"),
        ("4", "4.0.0"),
        ("4.0.0", "4.0.0"),
    ],
)
def test_a_series_of_semantic_versions(series: str, version: str) -> None:
    versions = "0.18.8+1.9.7 0.18.8+1.9.10 0.18.10+1.9.7 0.18.9 0.1.9 4.0.0-rc.1 4.0.0-rc.2 4.0.0 4.1.0-alpha".split()
    for order in (versions, versions[::-1]):
        assert _crate(series, *map(_line, order), _line("0.18.11", yanked=True)) == version


def test_why_a_series_has_no_version() -> None:
    with pytest.raises(UsageError, match=r"every version of the series 0\.4 is yanked") as caught:
        _crate("0.4", _line("0.4.0", yanked=True), _line("0.3.0"))
    assert "0.4.0" in (caught.value.reason or "")
    with pytest.raises(UsageError, match=r"no version in the series 1\.0") as caught:
        _crate("1.0", _line("1.0.0-rc.1"), _line("0.3.0"))
    assert "named in full" in (caught.value.hint or "")


def test_a_line_of_the_index_that_nobody_understands_is_passed_over() -> None:
    good = _line("1.0.0")
    assert _crate("1", _line("1.1"), '{"vers": 7}', "[", "", good, '{"vers": "1.2.0", "cksum": "zz"}') == "1.0.0"
    with pytest.raises(RemoteError, match="cannot be read"):
        _crate("1", "<html>")
