"""`vzrepro audit` on little recipes in the real sandbox: each leaks one thing, and exactly that must be named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import PROJECT, Cli, containers, interrupt_when
from vzrepro.base.signing import SigningKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.audit import AuditResult
from vzrepro.proof.attest.statement import Statement
from vzrepro.proof.audit.axes import AXES
from vzrepro.proof.audit.model import AuditReport

ALL = [axis.name for axis in AXES]

LEAKS = {
    "build-path": ("build-path", "pwd > /out/x"),
    "host-name": ("host-name", "uname -n > /out/x"),
    "user": ("user", "id -u > /out/x"),
    "user-tar": ("user", "touch f; tar -c --mtime=@0 --mode=644 f > /out/x"),
    "umask": ("umask", "touch f; tar -c --mtime=@0 --owner=0 --group=0 f > /out/x"),
    "time-zone": ("time-zone", "date -d @0 +%z > /out/x"),
    "locale": ("locale", "printf 'a\\nB\\n' | sort > /out/x"),
    "home": ("home", "echo ~ > /out/x"),
    "path": ("path", "echo $PATH > /out/x"),
    "environment": ("environment", 'echo "${USER-nobody}" > /out/x'),
    "cores": ("cores", "echo -j$VZ_CORES > /out/x"),
    "memory": ("memory", "grep MemTotal /proc/meminfo > /out/x"),
    "file-system": ("file-system", "stat -f -c %T . > /out/x"),
    "directory-order": ("directory-order", "ls -U /in/data/data > /out/x"),
    "kernel-version": ("kernel-version", "uname -r > /out/x"),
    "address-layout": ("address-layout", "grep stack /proc/self/maps | cut -d- -f1 > /out/x"),
    "day": ("clock", "date -u +%F > /out/x"),
    "second": ("clock", "date -u +%s > /out/x"),
    "mtime": ("clock", "touch f; tar -c --owner=0 --group=0 --mode=644 f > /out/x"),
    "shell": ("shell", "echo ${BASH_VERSION-none} > /out/x"),
    "input-topology": (
        "input-topology",
        "[ $(stat -c %h /in/script) = 1 ] && echo alone > /out/x || echo linked > /out/x",
    ),
    "process-id": ("process-ids", "echo $$ > /out/x"),
    "child": ("process-ids", "sh -c 'echo $$' > /out/x; :"),
    "random": ("randomness", "od -An -N8 -tx8 /dev/urandom > /out/x"),
    "temporary": ("randomness", "basename $(mktemp) > /out/x"),
    "build-id": ("randomness", "echo 'int main(void) { return 0; }' | gcc -Wl,--build-id=uuid -x c -o /out/x -"),
    "inode": ("inodes", "touch f; stat -c %i f > /out/x"),
    "race": (
        "cores",
        "seq 40 | xargs -P $VZ_CORES -n 1 sh -c 'seq $((($0 * 37 % 11) * 2000)) > /dev/null; echo $0 >> /out/x'",
    ),
}
"""Leak → the axis it follows, and what it does."""

RESTLESS = (
    "second",
    "mtime",
    "address-layout",
    "process-id",
    "child",
    "random",
    "temporary",
    "build-id",
    "inode",
    "race",
)
"""Leaks that may differ with nothing varied. Each is a recipe, `leak-<name>`: it would hide what others do."""

FEW = ("second", "build-id", "inode")
"""Those that each run of the tests audits; the others are for `./run test --all`, since each is two dozen builds."""

RESTLESS_PARAMS = [pytest.param(name, marks=[] if name in FEW else pytest.mark.thorough, id=name) for name in RESTLESS]

STILL = [name for name in LEAKS if name not in RESTLESS]
"""All others share recipes, with a file per leak: under an axis exactly its leaks' files may differ."""

_STILL_AXES = sorted({LEAKS[name][0] for name in STILL})
SHARED = {
    f"leak-still-{number}": [name for name in STILL if LEAKS[name][0] in _STILL_AXES[number::3]] for number in range(3)
}
"""The recipes of those, with their leaks: what an audit looks into is limited for each."""

RECIPES = """
from recipes.toolchain import C_IMAGE, TOOLS_IMAGE
from vzrepro import build, local, text

DATA = local("data")


def small(name, command, constant=None, image=TOOLS_IMAGE, **inputs):
    script = text("script", command)
    return build(
        name, image=image, command=["sh", "-e", "/in/script"], inputs={"script": script, **inputs}, constant=constant
    )


for name, command in LEAKS.items():
    small(name, command, image=C_IMAGE if "gcc" in command else TOOLS_IMAGE, data=DATA)

GOOD = small("good", "ls /in/data/data | LC_ALL=C sort > /out/x", data=DATA)
A = small("chain-a", "echo a > /out/x")
B = small("chain-b", "cat /in/a/x > /out/x; uname -n >> /out/x", a=A)
C = small("chain-c", "cat /in/b/x > /out/x", b=B)
small("picky", "[ $(umask) = 0022 ]; echo fine > /out/x")
small("contract", "pwd > /out/x", constant={"build-path": "its debugger looks for sources in /build"})
small("slow", "sleep 2; echo slow > /out/x")
"""


Snapshot = tuple[dict[str, tuple[int, int]], dict[str, list[tuple[Any, ...]]]]
"""A store's files, with inode and time of change, and its database's tables."""


@dataclass
class Audited:
    """A finished audit: the workspace it was made in, the report, what was printed, the exit code's error."""

    cli: Cli
    report: AuditReport
    error: str
    snapshots: tuple[Snapshot, Snapshot] = (({}, {}), ({}, {}))

    def causes(self, target: str) -> list[str]:
        return [cause.axis for cause in self.node(target).causes]

    def node(self, target: str) -> Any:
        return next(node for node in self.report.nodes if node.target == target)

    def cells(self, target: str, verdict: str) -> set[str]:
        return {axis for axis, cell in self.node(target).cells.items() if cell.verdict == verdict}


@pytest.fixture(scope="module")
def tooled(project: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has what the recipes and the audit need, for `_workspace`."""
    store = tmp_path_factory.mktemp("tooled") / "store"
    Cli(project.root, store).realize("image-tools", "image-c", "audit-tools")
    return store


def _workspace(place: Path, tooled: Path) -> Cli:
    root = place / "leaky"
    shutil.copytree(PROJECT / "recipes" / "toolchain", root / "recipes" / "toolchain")
    shutil.copy(PROJECT / "lock.toml", root)
    data = root / "recipes" / "leaky" / "data"
    data.mkdir(parents=True)
    for number in range(30):
        (data / f"file-{number * 7919 % 997}").write_text(f"{number}\n")
    (place / "store").mkdir()
    for entry in tooled.iterdir():
        # Nothing writes into an object, so links do; all that is made here is this store's own.
        linked = entry.name != ".vzrepro"
        copy = os.link if linked else shutil.copy2
        if entry.is_dir():
            shutil.copytree(entry, place / "store" / entry.name, symlinks=True, copy_function=copy)
        else:
            copy(entry, place / "store" / entry.name)
    cli = Cli(
        root,
        place / "store",
        {
            "VZREPRO_MACHINE_CACHE_DIR": str(place / "cache"),
            "VZREPRO_KEY_DIR": str(place / "keys"),
            "XDG_CACHE_HOME": str(place / "xdg"),
        },
    )
    commands = {f"leak-{name}": LEAKS[name][1] for name in RESTLESS}
    for target, names in SHARED.items():
        commands[target] = "\n".join(f"({LEAKS[name][1].replace('/out/x', f'/out/{name}')})" for name in names)
    cli.write(leaky=f"LEAKS = {commands!r}\n{RECIPES}")
    return cli


def _audit(cli: Cli, *words: str, code: int = 0) -> Audited:
    result = cli.run("audit", "--json", *words, code=code)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    document = next(line for line in lines if "nodes" in line)
    error = next((line for line in lines if line.get("event") == "error"), None)
    document = {key: value for key, value in document.items() if key not in ("verdict", "counts")}
    report = AuditReport.parse(json.dumps(document).encode(), "stdout")
    return Audited(cli, report, "" if error is None else json.dumps(error))


def _rebuilt(cli: Cli, *words: str, code: int = 0) -> list[str]:
    """What `audit` rebuilds: `target#what`, without the looks at sandboxes."""
    result = cli.run("audit", "--json", *words, code=code)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    started = [line for line in lines if line.get("event") == "started" and line["action"] == "audit"]
    return [
        f"{each['target']}#{each['path'].partition('#')[2]}" for each in started if not each["path"].endswith("look")
    ]


@pytest.fixture
def leaky(tmp_path: Path, tooled: Path) -> Cli:
    """The workspace with the leaking recipes and a store of its own."""
    return _workspace(tmp_path, tooled)


def _snapshot(cli: Cli) -> Snapshot:
    """All objects' files with inode and time of change of content, and the database's tables.

    But for the one of what running processes need, whose rows stay until the next one sweeps.
    """
    files = {}
    for entry in sorted(cli.store.iterdir()):
        if entry.name != ".vzrepro":
            for path in (entry, *sorted(entry.rglob("*"))):
                status = path.lstat()
                files[str(path)] = (status.st_ino, status.st_mtime_ns)
    with sqlite3.connect(f"file:{cli.store / '.vzrepro' / 'db.sqlite'}?mode=ro", uri=True) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        tables = {
            name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names if name != "temp_roots"
        }
    return files, tables


# --- the leak set -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaks(tooled: Path, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """One audit of leaking recipes and a good one."""
    cli = _workspace(tmp_path_factory.mktemp("leaks"), tooled)
    targets = [*(f"leak-{name}" for name in FEW), *SHARED, "good"]
    cli.realize(*targets)
    before = _snapshot(cli)
    audited = _audit(cli, *targets, code=104)
    audited.snapshots = before, _snapshot(cli)
    return audited


@pytest.fixture(scope="module")
def more_leaks(leaks: Audited) -> Audited:
    """One of the others, in the same workspace."""
    targets = [f"leak-{name}" for name in RESTLESS if name not in FEW]
    leaks.cli.realize(*targets)
    return _audit(leaks.cli, *targets, code=104)


@pytest.fixture
def audited(request: pytest.FixtureRequest) -> Audited:
    """The audit that has the leak `name` of the test."""
    few = request.node.callspec.params["name"] in FEW
    found: Audited = request.getfixturevalue("leaks" if few else "more_leaks")
    return found


@pytest.fixture(scope="module")
def chain(leaks: Audited) -> Audited:
    """One more, in the same workspace: of a chain, and of recipes that fail or hold something constant."""
    targets = ["good", "chain-c", "contract", "picky"]
    leaks.cli.realize(*targets)
    return _audit(leaks.cli, *targets, "--axes", "build-path,host-name,umask", code=104)


def test_neither_objects_nor_the_database_are_touched(leaks: Audited) -> None:
    (files, tables), (later_files, later_tables) = leaks.snapshots
    assert {path: later_files.get(path) for path in files} == files
    # The one thing that may be new is the tool that explains differences.
    assert [path for path in later_files if path not in files and "diffoscope" not in path] == []
    assert {"objects", "history", "derivations"} <= set(tables)
    for name, rows in tables.items():
        assert [row for row in later_tables[name] if row in rows] == rows, name
        if name in ("objects", "history", "derivations"):
            assert [row for row in later_tables[name] if row not in rows and "diffoscope" not in str(row)] == []


@pytest.mark.parametrize("name", RESTLESS_PARAMS)
def test_exactly_the_leaking_axis_is_named(audited: Audited, name: str) -> None:
    axis, _ = LEAKS[name]
    assert audited.causes(f"leak-{name}") == [axis]
    assert audited.node(f"leak-{name}").verdict == "DIFFERS"
    assert audited.cells(f"leak-{name}", "DIFFERS") <= {"repeat", axis}
    assert audited.cells(f"leak-{name}", "BUILD_FAILED") <= {"shell"}


@pytest.mark.parametrize("target", SHARED)
def test_of_many_leaks_each_is_a_cause(leaks: Audited, target: str) -> None:
    axes = {LEAKS[name][0] for name in SHARED[target]}
    assert sorted(leaks.causes(target)) == sorted(axes)
    assert leaks.cells(target, "DIFFERS") == axes
    assert leaks.cells(target, "BUILD_FAILED") == set()


@pytest.mark.parametrize("name", RESTLESS_PARAMS)
def test_every_difference_is_explained(audited: Audited, name: str) -> None:
    (cause,) = audited.node(f"leak-{name}").causes
    assert cause.guess is not None
    assert cause.guess.fix
    (detail, *_) = audited.report.explanations[cause.explanation].details
    assert detail.file == "x"


@pytest.mark.parametrize("target", SHARED)
def test_a_difference_is_explained_by_the_files_that_follow_its_axis(leaks: Audited, target: str) -> None:
    for cause in leaks.node(target).causes:
        assert cause.guess is not None, cause.axis
        assert cause.guess.fix
        details = leaks.report.explanations[cause.explanation].details
        assert {detail.file for detail in details} == {name for name in SHARED[target] if LEAKS[name][0] == cause.axis}


def test_a_good_recipe_reproduces_on_every_axis(leaks: Audited) -> None:
    good = leaks.node("good")
    assert good.verdict == "REPRODUCED"
    assert set(good.cells) == {"repeat", *ALL}
    # A second OCI runtime is the one thing that a machine need not have.
    assert leaks.cells("good", "REPRODUCED") >= {"repeat", *ALL} - {"runtime"}
    for axis in ALL:
        if good.cells[axis].verdict == "REPRODUCED":
            assert good.cells[axis].together == 1
    observed = {axis: pair for run in good.rebuilds for axis, pair in run.observed.items()}
    assert observed["host-name"][0] != observed["host-name"][1]
    assert all(before != within for before, within in observed.values())


def test_only_the_origin_of_a_chain_is_blamed(chain: Audited) -> None:
    assert chain.node("chain-a").verdict == "REPRODUCED"
    assert chain.node("chain-b").verdict == "DIFFERS"
    assert chain.causes("chain-b") == ["host-name"]
    assert chain.node("chain-c").verdict == "REPRODUCED", "it was built on the registered chain-b"
    assert chain.node("chain-c").inputs["b"] == chain.node("chain-b").drv_hash
    assert [node.origin for node in chain.report.nodes if node.target.startswith("chain-")] == [False, True, False]


def test_a_build_that_fails_under_an_axis(chain: Audited) -> None:
    picky = chain.node("picky")
    assert picky.verdict == "BUILD_FAILED"
    assert chain.cells("picky", "BUILD_FAILED") == {"umask"}
    assert "exit code 1" in picky.cells["umask"].reason
    (run,) = [run for run in picky.rebuilds if run.axes == ("umask",)]
    assert run.nar_hash is None
    assert (chain.cli.store / ".vzrepro" / "audit" / "logs" / f"{run.id}.log").exists()


def test_what_a_recipe_holds_constant_is_not_passed(chain: Audited) -> None:
    contract = chain.node("contract")
    assert contract.verdict == "REPRODUCED"
    cell = contract.cells["build-path"]
    assert (cell.verdict, cell.held, cell.rebuilds) == ("UNTESTED", "its debugger looks for sources in /build", ())


def test_the_error_names_each_origin_and_its_cause(chain: Audited) -> None:
    assert "chain-b: the cause is host-name" in chain.error
    assert "chain-a:" not in chain.error
    assert "chain-c:" not in chain.error


def test_sources_and_images_are_listed_as_untested(leaks: Audited) -> None:
    kinds = {node.kind for node in leaks.report.nodes}
    assert kinds == {"sandbox", "image", "fetch", "local"}
    others = [node for node in leaks.report.nodes if node.kind != "sandbox"]
    assert {node.verdict for node in others} == {"UNTESTED"}
    assert {image.target for image in leaks.report.seed.images} == {"image-tools", "image-c"}
    assert 0 < leaks.report.seed.packages < sum(image.packages for image in leaks.report.seed.images)
    assert 0 < leaks.report.seed.bytes < sum(image.bytes for image in leaks.report.seed.images)


def test_every_rebuild_has_a_signed_statement(chain: Audited) -> None:
    """Differing or not; kept beside the store, and in the machine's cache, which can be written."""
    key = SigningKey.load(Path(chain.cli.env["VZREPRO_KEY_DIR"]) / "machine.key").public
    assert chain.report.builder["key"] == str(key)
    for target in ("good", "chain-b", "picky"):
        node = chain.node(target)
        verdicts = {}
        for run in node.rebuilds:
            name = f"attest/{node.drv_hash}/{key.id}/{run.statement}.json"
            data = (chain.cli.store / ".vzrepro" / name).read_bytes()
            assert (Path(chain.cli.env["VZREPRO_MACHINE_CACHE_DIR"]) / name).read_bytes() == data
            envelope = dsse.parse(data)
            assert envelope.signers([key]) == {key}
            result = AuditResult.of(Statement.of(envelope))
            assert result.registered.nar_hash.hex == node.nar_hash
            assert (None if result.rebuilt is None else result.rebuilt.nar_hash.hex) == run.nar_hash
            assert (result.axes, result.held, result.verdict) == (run.axes, run.held, run.verdict.value)
            assert result.observed == run.observed
            verdicts[run.axes] = result.verdict
        assert verdicts[()] == "REPRODUCED"
        assert verdicts["umask",] == ("BUILD_FAILED" if target == "picky" else "REPRODUCED")
        assert verdicts["host-name",] == ("DIFFERS" if target == "chain-b" else "REPRODUCED")


def test_history_and_show(chain: Audited, tmp_path: Path) -> None:
    cli, audit_id = chain.cli, chain.report.id
    lines = cli.run("audit", "history", "chain-c").stdout.splitlines()
    assert any(line.startswith(audit_id) for line in lines[1:])
    assert audit_id not in cli.run("audit", "history", "slow").stdout
    shown = cli.run("audit", "show", audit_id[:6]).stdout
    assert f"audit {audit_id}: DIFFERS" in shown
    assert "chain-b" in shown
    assert "trusted binary seed: " in shown
    cells = cli.run("audit", "show", audit_id, "--cells").stdout
    assert any(line.split()[:3] == ["chain-b", "host-name", "DIFFERS"] for line in cells.splitlines())
    cli.run("audit", "show", audit_id, "--report", str(tmp_path / "out"))
    assert AuditReport.parse(_without_summary(tmp_path / "out" / "report.json"), "out") == chain.report
    assert "chain-b" in (tmp_path / "out" / "index.html").read_text()
    cli.run("audit", "show", "nothing-of-the-kind", code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    cli.run("audit", "show", audit_id, "--report", str(tmp_path / "full"), code=2)


def _without_summary(file: Path) -> bytes:
    document = json.loads(file.read_bytes())
    return json.dumps({key: value for key, value in document.items() if key not in ("verdict", "counts")}).encode()


# --- one audit at a time ----------------------------------------------------------------------------------------------


def test_what_is_known_is_not_made_again(leaky: Cli) -> None:
    axes = ("--axes", "host-name,umask")
    first = _rebuilt(leaky, "good", *axes)
    assert sorted(first) == ["good#host-name", "good#repeat", "good#umask"]
    assert _rebuilt(leaky, "good", *axes) == []
    again = _audit(leaky, "good", *axes)
    assert {cell.reused for cell in again.node("good").cells.values()} == {True}
    assert _rebuilt(leaky, "good", "--axes", "host-name,home") == ["good#home"]
    assert len(_rebuilt(leaky, "good", *axes, "--fresh")) == 3
    (leaky.root / "recipes" / "leaky" / "data" / "file-0").write_text("another\n")
    assert len(_rebuilt(leaky, "good", *axes)) == 3, "another input is another question"


def test_another_builder_does_not_rely_on_the_first(leaky: Cli, tmp_path: Path) -> None:
    _rebuilt(leaky, "good", "--axes", "umask")
    SigningKey.generate("other").save(tmp_path / "other.key")
    assert len(_rebuilt(leaky, "good", "--axes", "umask", "--key", str(tmp_path / "other.key"))) == 2


def test_quick_is_one_rebuild(leaky: Cli) -> None:
    audited = _audit(leaky, "good", "--quick")
    good = audited.node("good")
    assert good.verdict == "REPRODUCED"
    (run,) = good.rebuilds
    assert len(run.axes) > 15
    assert good.cells["umask"].together == len(run.axes)
    assert audited.cells("good", "REPRODUCED") >= {"repeat", *ALL} - {"runtime"}
    assert _rebuilt(leaky, "good", "--quick") == []


def test_quick_tells_that_but_not_why(leaky: Cli) -> None:
    audited = _audit(leaky, "chain-c", "--quick", code=104)
    assert audited.node("chain-b").verdict == "DIFFERS"
    assert audited.causes("chain-b") == []
    assert audited.cells("chain-b", "INCONCLUSIVE") >= {"host-name", "umask"}
    assert audited.node("chain-a").verdict == audited.node("chain-c").verdict == "REPRODUCED"


def test_build_failures_have_their_own_exit_code(leaky: Cli) -> None:
    assert _audit(leaky, "picky", "--axes", "umask", code=100).node("picky").verdict == "BUILD_FAILED"


@pytest.mark.thorough
def test_rounds(leaky: Cli) -> None:
    runs = _rebuilt(leaky, "good", "--axes", "host-name", "--rounds", "3")
    assert sorted(runs) == [
        "good#host-name",
        "good#host-name, round 2",
        "good#host-name, round 3",
        "good#repeat",
        "good#repeat, again",
        "good#repeat, attempt 3",
    ]


def test_deep_makes_images_and_downloads_again(leaky: Cli) -> None:
    audited = _audit(leaky, "good", "--axes", "repeat", "--deep")
    assert audited.node("image-tools").verdict == "REPRODUCED"
    assert audited.node("debs-tools").verdict == "REPRODUCED"
    assert set(audited.node("good").cells) == {"repeat"}


def test_an_interrupted_audit_goes_on_where_it_was(leaky: Cli) -> None:
    leaky.realize("slow")
    words = ("audit", "slow", "--axes", "host-name,umask,home", "--jobs", "1")
    with leaky.start(*words) as process:
        out, err = interrupt_when(process, "slow (host-name) REPRODUCED")
    assert process.returncode == 130, err
    assert "incomplete" in out
    assert containers(leaky) == []
    assert not list((leaky.store / ".vzrepro" / "tmp").glob("*.scratch"))
    rest = _rebuilt(leaky, *words[1:])
    assert "slow#repeat" not in rest
    assert "slow#host-name" not in rest
    assert {"slow#home", "slow#umask"} >= set(rest) >= {"slow#home"}
    history = leaky.run("audit", "history", "slow").stdout.splitlines()
    assert len(history) == 3


@pytest.mark.thorough
def test_a_killed_audit_leaves_nothing_that_hurts(leaky: Cli) -> None:
    leaky.realize("slow")
    words = ("audit", "slow", "--axes", "file-system,umask", "--jobs", "1")
    with leaky.start(*words) as process:
        interrupt_when(process, "audit slow (file-system)", signal.SIGKILL, inside=leaky)
    assert "slow#repeat" not in _rebuilt(leaky, *words[1:])
    assert containers(leaky) == []
    assert not list((leaky.store / ".vzrepro" / "tmp").glob("*.scratch"))


def test_a_damaged_record_is_made_again(leaky: Cli) -> None:
    _rebuilt(leaky, "good", "--axes", "umask")
    records = sorted((leaky.store / ".vzrepro" / "audit" / "rebuilds").rglob("*.json"))
    for record in records:
        record.write_bytes(record.read_bytes()[:-20])
    result = leaky.run("audit", "good", "--axes", "umask")
    assert result.stderr.count("is damaged and not looked at") == len(records)
    assert "good (umask) REPRODUCED" in result.stderr


def test_a_corrupt_input_blames_nobody(leaky: Cli) -> None:
    leaky.realize("chain-c")
    (place,) = leaky.store.glob("*-chain-a")
    (place / "x").chmod(0o644)
    (place / "x").write_text("b\n")
    result = leaky.run("audit", "chain-c", "--axes", "umask", code=102)
    assert f"{place.name} is corrupt" in result.stderr
    assert "vzrepro store repair" in result.stderr
    assert "DIFFERS" not in result.stdout


def test_what_is_not_here_is_realized_first(leaky: Cli) -> None:
    result = leaky.run("audit", "good", "--axes", "umask")
    assert "realized first, which is no part of the audit" in result.stderr
    assert "realized first" not in leaky.run("audit", "good", "--axes", "umask").stderr


def test_against_another_cache(leaky: Cli, tmp_path: Path) -> None:
    """A cache with equal bytes, one with other bytes, one with nothing."""
    other = _other_builder(leaky, tmp_path / "other")
    leaky.realize("good", "leak-second")
    same, lying, empty = (f"file://{tmp_path / name}" for name in ("same", "lying", "empty"))
    SigningKey.generate("other").save(tmp_path / "push.key")
    for cli, place in ((leaky, same), (other, lying)):
        cli.env |= {"VZREPRO_UPLOAD_KEY": str(tmp_path / "push.key"), "VZREPRO_PUSH_TO": place}
        cli.run("cache", "push", "good", "leak-second")
        del cli.env["VZREPRO_UPLOAD_KEY"], cli.env["VZREPRO_PUSH_TO"]
    (tmp_path / "empty").mkdir()
    axes = ("--axes", "umask")
    agreeing = _audit(leaky, "good", *axes, "--against", same, "--against", empty)
    rows = {(each.cache, each.target): each for each in agreeing.report.against}
    assert rows[same, "good"].agrees is True
    assert rows[same, "good"].signers == ("other",)
    assert rows[empty, "good"].agrees is None
    result = leaky.run("audit", "leak-second", *axes, "--against", lying, code=104)
    assert "has other bytes for leak-second, signed by other" in result.stdout


def _other_builder(cli: Cli, place: Path) -> Cli:
    other = Cli(cli.root, place / "store", {**cli.env, "VZREPRO_MACHINE_CACHE_DIR": str(place / "cache")})
    shutil.copytree(cli.store, other.store, symlinks=True)
    other.realize("good", "leak-second")
    return other


# --- what is asked wrongly --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["good", "--axes", "moon-phase"], "no axis is called 'moon-phase'"),
        (["nowhere"], "no target is called 'nowhere'"),
        (["good", "--rounds", "0"], "--rounds"),
        (["good", "--key", "/nowhere/key"], "cannot read the key file"),
        ([], "audit"),
    ],
)
def test_usage(leaky: Cli, words: list[str], said: str) -> None:
    result = leaky.run("audit", *words, code=2)
    assert said in result.stderr + result.stdout


@pytest.mark.thorough
def test_a_target_that_is_called_like_a_verb(leaky: Cli) -> None:
    leaky.write(
        names=RECIPES.partition("for name")[0].replace('DATA = local("data")', "") + 'small("history", "echo > /out/x")'
    )
    assert "no audit of history" in leaky.run("audit", "history", "history").stdout
    assert _rebuilt(leaky, "--", "history", code=0) != []
    assert "REPRODUCED" in leaky.run("audit", "history", "history").stdout


def test_without_docker(leaky: Cli) -> None:
    leaky.env["VZREPRO_DOCKER"] = "/nowhere/docker"
    assert "no Docker client was found" in leaky.run("audit", "good", code=1).stderr


def test_a_full_disk_is_no_verdict(leaky: Cli, tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    """The build meets it, and so its failure is not the recipe's."""
    disk = mounted("size=1500m")
    small = Cli(leaky.root, disk / "store", leaky.env)
    big = 'big = small("big", "head -c 60000000 /dev/zero > /out/x")'
    small.write(
        big=RECIPES.partition("DATA =")[0] + RECIPES.partition('local("data")')[2].partition("for name")[0] + big
    )
    shutil.copytree(leaky.store, small.store, symlinks=True)
    small.realize("big")
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(b"x" * (free - 30_000_000))
    result = small.run("audit", "big", "--axes", "umask", code=1)
    assert "is full" in result.stderr
    assert "BUILD_FAILED" not in result.stdout
    (disk / "ballast").unlink()
    assert "umask" in " ".join(_rebuilt(small, "big", "--axes", "umask"))
