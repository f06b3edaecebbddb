"""Who says what about capabilities: the recipes' records, the probes that vz-probe has, what breaks a bundle's word."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vzrepro.guest.vm import probes
from vzrepro.guest.vm.probes import Proof

RECIPES = Path(__file__).parents[2] / "recipes"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"probes_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


capabilities = load(RECIPES / "kernel/capabilities.py")
run = load(RECIPES / "probes/run.py")


state = load(RECIPES / "probes/state.py")


def names_in(source: str) -> set[str]:
    """The names in a table of vz-probe's."""
    table = (RECIPES / "probes/src" / source).read_text().partition("const PROBES")[2].partition("];")[0]
    return set(re.findall(r'\("(\w+)",', table))


@pytest.mark.parametrize("profile", capabilities.PROFILES, ids=lambda profile: profile.name)
def test_everything_a_profile_promises_has_a_probe(profile: object) -> None:
    assert {one.probe for one in profile.capabilities} <= names_in("probes/mod.rs") | {*run.OF_STATE}  # type: ignore[attr-defined]
    assert {one.probe for one in profile.forbidden} <= names_in("absent.rs")  # type: ignore[attr-defined]


def test_every_probe_of_a_capability_is_some_profiles() -> None:
    used = {one.probe for profile in capabilities.PROFILES for one in profile.capabilities}
    assert names_in("probes/mod.rs") | {*run.OF_STATE} == used
    assert probes._OF_STATE == run.OF_STATE == tuple(state.PROOFS)


@pytest.mark.parametrize(
    ("proof", "broken"),
    [
        (Proof("tun", True, True, "PROVEN", ""), False),
        (Proof("tun", True, None, "FAILED", ""), True),
        (Proof("tun", True, False, "PROVEN", ""), True),
        (Proof("tun", True, True, "INCONCLUSIVE", ""), False),
        (Proof("tun", False, False, "FAILED", ""), False),
        (Proof("absent:tun", None, None, "PROVEN", ""), False),
        (Proof("absent:tun", None, None, "FAILED", ""), True),
    ],
)
def test_what_breaks_a_bundles_word(proof: Proof, broken: bool) -> None:
    assert proof.broken is broken


WANTED = {"profile": "p", "capabilities": {"one": "probe_one", "two": "probe_two"}, "absent": ["tun"]}


def line(name: str, verdict: str = "PROVEN") -> str:
    return json.dumps({"capability": name, "verdict": verdict, "detail": "so it is"})


def test_the_report_says_what_was_found_and_nothing_is_wrong() -> None:
    report, problems = run.verdicts(WANTED, [line("absent:tun"), line("probe_two"), line("probe_one")])
    proven = {"verdict": "PROVEN", "detail": "so it is"}
    assert report == {"profile": "p", "capabilities": {"one": proven, "two": proven}, "absent": {"tun": proven}}
    assert problems == []


def test_whatever_is_not_proven_is_wrong_and_named() -> None:
    _, problems = run.verdicts(WANTED, [line("probe_one", "INCONCLUSIVE"), line("absent:tun", "FAILED")])
    assert problems == [
        "one: INCONCLUSIVE: so it is",
        "two: FAILED: the probe gave no verdict",
        "absent:tun: FAILED: so it is",
    ]
