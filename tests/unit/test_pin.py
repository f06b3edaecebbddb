"""What `lock` decides: what is kept, what is resolved, what `--check` finds, what moved."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path

import pytest

from tests.conftest import Workspace
from vzrepro import fetch
from vzrepro.errors import UsageError
from vzrepro.evaluate import evaluate
from vzrepro.lock import ImagePin, Lock, PinnedFile, SourcePin
from vzrepro.model import FileHash
from vzrepro.pin import Moved, Pinner, check, moves
from vzrepro.recipe import Want

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
    assert moves(old, new) == [Moved("source thing", "1.0", "1.1")]
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
    with pytest.raises(UsageError, match=r"recipes/a/__init__\.py:4: no such package"):
        pinner.resolve(Lock())
