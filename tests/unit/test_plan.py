"""The plan is a value: what is decided for every node, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from vzrepro.base.model import BuildKey, DrvHash, FileHash, NarHash, ObjectInfo, StorePath, canonical_json
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.lock import PinnedFile
from vzrepro.recipe.plan import FieldChange, Offer, diff, make_plan, nearest, objection, why

Declare = Callable[..., DrvGraph]

RECIPES = """
from vzrepro import build, debian_image, text
TOOLS = debian_image("tools", suite="trixie", packages=["dash"])
LOW = build("low", image=TOOLS, command=["x"], inputs={"t": text("t", "hello")})
HIGH = build("high", image=TOOLS, command=["x"], inputs={"low": LOW})
"""


@dataclass
class World:
    """What is here, elsewhere and remembered, as plain data."""

    objects: dict[StorePath, ObjectInfo] = field(default_factory=dict)
    origins: set[tuple[StorePath, FileHash]] = field(default_factory=set)
    offered: dict[StorePath, Offer] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    keys: dict[BuildKey, ObjectInfo] = field(default_factory=dict)
    kept: list[tuple[DrvHash, str, bytes]] = field(default_factory=list)

    def have(self, paths: Sequence[StorePath]) -> dict[StorePath, ObjectInfo]:
        return {path: self.objects[path] for path in paths if path in self.objects}

    def origin_known(self, path: StorePath, origin: FileHash) -> bool:
        return (path, origin) in self.origins

    def offers(self, nodes: Sequence[Node]) -> dict[StorePath, Offer]:
        self.asked.append([node.target for node in nodes])
        return {node.path: self.offered[node.path] for node in nodes if node.path in self.offered}

    def equal(self, key: BuildKey) -> ObjectInfo | None:
        return self.keys.get(key)

    def expected_secs(self, target: str, verb: str) -> float | None:
        return 60.0 if verb == "build" else None

    def derivation(self, drv: DrvHash) -> bytes | None:
        return next((canonical for kept, _name, canonical in self.kept if kept == drv), None)

    def derivations_named(self, name: str) -> list[tuple[DrvHash, bytes, int]]:
        return [(drv, canonical, 0) for drv, kept, canonical in self.kept if kept == name]

    def add(self, *nodes: Node) -> None:
        for node in nodes:
            info = ObjectInfo(node.path, NarHash.of(node.target.encode()), 1)
            self.objects[node.path] = info
            if node.origin is not None:
                self.origins.add((node.path, node.origin))

    def keep(self, graph: DrvGraph) -> None:
        for node in graph.nodes.values():
            self.kept.insert(0, (node.drv_hash, node.target, canonical_json(node.drv.document())))


def _verbs(graph: DrvGraph, world: World, target: str = "high") -> dict[str, str]:
    return {step.node.target: step.verb for step in make_plan(graph, [graph.find(target)], world).steps}


def test_nothing_is_here(declare: Declare) -> None:
    graph = declare(a=RECIPES)
    verbs = _verbs(graph, World())
    assert verbs == {"debs-tools": "fetch", "image-tools": "image", "t": "import", "low": "build", "high": "build"}
    order = list(verbs)
    assert order.index("low") < order.index("high")


def test_what_is_here_hides_what_is_below(declare: Declare) -> None:
    graph, world = declare(a=RECIPES), World()
    world.add(graph.find("high"))
    assert _verbs(graph, world) == {"high": "have"}


def test_a_cache_saves_the_toolchain(declare: Declare) -> None:
    graph, world = declare(a=RECIPES), World()
    world.offered[graph.find("high").path] = Offer(1000, None, "file:///cache")
    plan = make_plan(graph, [graph.find("high")], world)
    assert [(step.verb, step.download_bytes) for step in plan.steps] == [("substitute", 1000)]
    assert plan.actions() == {"substitute": 1}
    assert plan.download_bytes() == 1000


def test_caches_are_asked_a_level_at_a_time_and_only_about_what_may_be_needed(declare: Declare) -> None:
    graph, world = declare(a=RECIPES), World()
    world.offered[graph.find("low").path] = Offer(1000, None, "file:///cache")
    make_plan(graph, [graph.find("high")], world)
    assert [sorted(level) for level in world.asked] == [["high"], ["image-tools", "low"], ["debs-tools"]]
    world.asked.clear()
    world.add(graph.find("high"))
    make_plan(graph, [graph.find("high")], world)
    assert world.asked == [[]]


def test_the_nearest_of_those_kept_is_compared_with(declare: Declare) -> None:
    near = declare(a=RECIPES.replace("hello", "hi"))
    far = declare(a=RECIPES.replace("hello", "hi").replace('"x"', '"y"'))
    graph, world = declare(a=RECIPES), World()
    near_first = World()
    for one, order in ((world, (near, far)), (near_first, (far, near))):
        for each in order:
            one.keep(each)
    for one in (world, near_first):
        found = why(graph, graph.find("high"), one, nearest)
        assert [change.field for change in found[0][1]] == ["inputs.low"]
    assert [change.field for change in why(graph, graph.find("high"), world)[0][1]] == ["command", "inputs.low"]


def test_equal_inputs_are_copied_not_built(declare: Declare) -> None:
    """Early cutoff: `low` has another drv hash, but came out with the same bytes as before."""
    before, after = declare(a=RECIPES), declare(a=RECIPES.replace("hello", "hello again"))
    world = World()
    world.add(*before.nodes.values())
    world.add(after.find("low"))
    assert before.find("high").path != after.find("high").path
    nar_hashes = {drv: world.objects[before.nodes[drv].path].nar_hash for drv in before.find("high").drv.dependencies()}
    world.keys[before.find("high").drv.build_key(nar_hashes)] = world.objects[before.find("high").path]
    assert _verbs(after, world)["high"] == "copy"


def test_a_build_that_may_be_saved_says_so(declare: Declare) -> None:
    graph = declare(a=RECIPES)
    steps = {step.node.target: step for step in make_plan(graph, [graph.find("high")], World()).steps}
    assert "unless low come out as they were" in steps["high"].reason
    assert steps["high"].expected_secs == 60.0


@pytest.fixture
def fetched(declare: Declare) -> tuple[DrvGraph, Node]:
    """A graph whose `debs-tools` downloads one file."""
    graph = declare(a=RECIPES)
    node = graph.find("debs-tools")
    return graph, replace(node, files={"a.deb": PinnedFile("mirror://debian/pool/a.deb", FileHash.of(b"a"), 5)})


def test_a_changed_url_is_fetched_once_again(fetched: tuple[DrvGraph, Node]) -> None:
    graph, node = fetched
    world = World()
    world.add(node)
    assert [step.verb for step in make_plan(graph, [node], world).steps] == ["have"]
    moved = replace(node, files={"a.deb": PinnedFile("mirror://debian/pool/b.deb", FileHash.of(b"a"), 5)})
    assert moved.path == node.path
    (step,) = make_plan(graph, [moved], world).steps
    assert (step.verb, step.download_bytes) == ("fetch", 5)
    assert "URL changed" in step.reason
    assert moved.origin is not None
    world.origins.add((node.path, moved.origin))
    assert [step.verb for step in make_plan(graph, [moved], world).steps] == ["have"]


def test_a_cached_download_from_other_urls_is_not_taken(fetched: tuple[DrvGraph, Node]) -> None:
    graph, node = fetched
    world = World()
    world.offered[node.path] = Offer(1, FileHash.of(b"other urls"), "file:///cache")
    assert [step.verb for step in make_plan(graph, [node], world).steps] == ["fetch"]
    world.offered[node.path] = Offer(1, node.origin, "file:///cache")
    assert [step.verb for step in make_plan(graph, [node], world).steps] == ["substitute"]
    for origin, said in ((FileHash.of(b"other urls"), "from another URL"), (None, r"\(VzOrigin is lost")):
        world.offered[node.path] = Offer(1, origin, "file:///cache")
        assert [step.verb for step in make_plan(graph, [node], world).steps] == ["fetch"]
        assert re.search(
            f"file:///cache has .*debs-tools, but .*{said}", objection(node, origin, "file:///cache") or ""
        )
    assert objection(node, node.origin, "file:///cache") is None
    assert objection(graph.find("image-tools"), None, "file:///cache") is None


def test_a_long_chain_does_not_recurse(declare: Declare) -> None:
    chain = RECIPES + (
        "last = LOW\nfor n in range(3000):\n"
        "    last = build(f'n{n}', image=TOOLS, command=['x'], inputs={'last': last})\n"
    )
    graph = declare(a=chain)
    assert len(make_plan(graph, [graph.find("n2999")], World()).steps) == 3004


def test_why_follows_inputs_to_the_origin(declare: Declare) -> None:
    before, after = declare(a=RECIPES), declare(a=RECIPES.replace("hello", "goodbye"))
    world = World()
    world.keep(before)
    found = why(after, after.find("high"), world)
    assert [(target, [change.field for change in changes]) for target, changes in found] == [
        ("high", ["inputs.low"]),
        ("low", ["inputs.t"]),
        ("t", ["content."]),
    ]


def test_why_knows_nothing_of_the_first_time(declare: Declare) -> None:
    graph = declare(a=RECIPES)
    assert why(graph, graph.find("high"), World()) == []


def test_diff_is_structural() -> None:
    old = {"a": 1, "env": {"X": "1", "Y": "2"}, "list": [1]}
    new = {"a": 1, "env": {"X": "3", "Z": "4"}, "list": [1, 2]}
    assert diff(old, new) == [
        FieldChange("env.X", "1", "3"),
        FieldChange("env.Y", "2", None),
        FieldChange("env.Z", None, "4"),
        FieldChange("list", [1], [1, 2]),
    ]
    assert json.dumps([change.after for change in diff(old, new)])
