"""Documentation is true: commands it shows parse, verbs it lists exist, links lead somewhere, none is left out."""

from __future__ import annotations

import ast
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import vzrepro.recipes
from vzrepro import DSL
from vzrepro.cache.places import KINDS
from vzrepro.cli import group
from vzrepro.cli.options import DefaultVerb
from vzrepro.guest.metadata import CAPABILITIES, KernelProfile
from vzrepro.proof.audit.axes import AXES
from vzrepro.proof.audit.causes import FIXES
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.lock import Lock

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands(page: Path) -> list[list[str]]:
    """Every `vzrepro …` or `./run …` command line a page shows, cut at comments and placeholders."""
    found = []
    for match in re.finditer(r"(?:`|^)(?:\./run|vzrepro) ([a-z][^`\n#]*)", page.read_text(), re.MULTILINE):
        found.append(match[1].split())
    return found


def _verb(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = group
    rest = list(words)
    while isinstance(command, click.Group):
        if isinstance(command, DefaultVerb) and (not rest or rest[0] not in command.commands):
            rest.insert(0, command.default)
        name = rest.pop(0)
        assert name in command.commands, f"there is no verb {name!r}"
        command = command.commands[name]
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_exist(page: Path) -> None:
    for words in _commands(page):
        if words[0] == "test":
            continue
        names = words[0].rstrip(",…").split("|")
        grouped = next((number for number, word in enumerate(words) if number and "\\|" in word), None)
        if grouped is not None and "-" not in words[grouped][:1]:
            for name in words[grouped].replace("\\", "").split("|"):
                _verb([*words[:grouped], name])
            continue
        command, rest = _verb([names[0], *words[1:]])
        options = {option for parameter in command.params for option in parameter.opts}
        own = rest[: rest.index("--")] if "--" in rest else rest  # what follows is another program's
        for word in own:
            option = word.strip("[]…,").split("=")[0]
            if option.startswith("--"):
                assert option in options, f"{page.name}: {' '.join(words)}: no option {option}"


def _texts(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may give; what is filled in is a word of its own."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield from map("".join, itertools.product(*map(list, map(_texts, parts))))
        case ast.FormattedValue(value=ast.IfExp() as either):
            yield from _texts(either)
        case ast.BinOp(left=left, right=right):
            yield from (f"{one}{other}" for one in _texts(left) for other in _texts(right))
        case ast.IfExp(body=one, orelse=other):
            yield from (*_texts(one), *_texts(other))
        case ast.Constant(value=None):
            pass
        case _:
            yield "FILLED"


def _hints() -> Iterator[tuple[str, str]]:
    """Every hint of the program, given to an error or put into a variable of that name, and where it is."""
    for module in sorted((ROOT / "vzrepro").rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_bytes())):
            match node:
                case ast.keyword(arg="hint", value=value) | ast.Assign(targets=[ast.Name(id="hint")], value=value):
                    yield from ((text, f"{module.relative_to(ROOT)}:{value.lineno}") for text in _texts(value))


def test_hinted_commands_exist() -> None:
    seen = 0
    for hint, place in _hints():
        for shown in re.findall(r"(?:^|[:;?] |&& |\()vzrepro ([a-z][^;,()&]*)", hint):
            command, rest = _verb(shown.split())
            options = {option for parameter in command.params for option in (*parameter.opts, "--help")}
            assert {word for word in rest if word.startswith("--") and word != "--"} <= options, f"{place}: {hint}"
            seen += 1
    assert seen > 50


def _verbs(command: click.Command, prefix: str = "") -> list[str]:
    if isinstance(command, DefaultVerb):
        names = [name for name in command.commands if name != command.default]
        return [prefix.strip(), *(f"{prefix}{name}" for name in names)]
    if isinstance(command, click.Group):
        return [verb for name, sub in command.commands.items() for verb in _verbs(sub, f"{prefix}{name} ")]
    return [prefix.strip()]


def test_every_verb_is_in_the_readme_and_explains_itself() -> None:
    readme = (ROOT / "README.md").read_text().replace("\\|", " ")
    for verb in _verbs(group):
        assert re.search(rf"\b{verb.split()[-1]}\b", readme), f"README.md does not mention {verb}"
        command, _ = _verb(verb.split())
        assert command.help, f"{verb} has no help"


def test_recipes_that_are_shown_can_be_evaluated(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    kinds = set()
    for number, block in enumerate(blocks):
        root = tmp_path / str(number)
        folder = root / "recipes/shown"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(block)
        for name in ("build.sh", "upstream.asc"):
            (folder / name).write_bytes(b"")
        kinds |= {want.kind for want in evaluate(root, Lock(), "linux/amd64", lenient=True).wants}
    assert kinds >= {"debian-source", "git-source", "image", "pypi-source", "url-source"}


def test_every_recipe_function_is_documented() -> None:
    guide = (ROOT / "docs/recipes.md").read_text()
    for name in (*DSL, *filter(str.islower, vzrepro.recipes.__all__)):
        assert f"`{name}(" in guide


# --- tables that are made from records ----------------------------------------------------------------------------


def _rows_of_capabilities() -> list[str]:
    known: dict[str, list[str]] = {}
    for each in CAPABILITIES:
        since = "none is known" if each.since is None else f"v{'.'.join(map(str, each.since))}"
        known.setdefault(since, []).append(each.name)
    return [f"| `{' '.join(names)}` | {since} |" for since, names in known.items()]


TABLES = {
    "audit.md": (
        "| axis | varied | how | seen by | leads to |",
        [f"| `{axis.name}` | {axis.about} | {axis.applied} | {axis.proof} | {axis.cause} |" for axis in AXES],
    ),
    "bundle.md": ("| capabilities | the oldest released host that knows them |", _rows_of_capabilities()),
    "cache.md": (
        "| place | what | written to |",
        [
            f"| {', '.join(f'`{form}`' for form in kind.forms)} | {kind.about} | {'yes' if kind.writable else 'no'} |"
            for kind in KINDS
        ],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_made_from_the_records(name: str) -> None:
    """To write them anew: VZREPRO_ACCEPT=1."""
    page, (head, rows) = ROOT / "docs" / name, TABLES[name]
    before, found, after = page.read_text().partition(f"{head}\n")
    assert found, f"{name} has no table with the heading {head}"
    line, *shown = after.partition("\n\n")[0].split("\n")
    if os.environ.get("VZREPRO_ACCEPT"):
        page.write_text(before + found + "\n".join([line, *rows]) + "\n\n" + after.partition("\n\n")[2])
    else:
        assert shown == rows


def test_every_axis_has_a_cause_with_a_remedy() -> None:
    assert {axis.cause for axis in AXES} <= FIXES.keys()


def test_every_capability_is_in_the_pages_about_probes_and_kernels() -> None:
    probes = re.findall(r"^\| `([a-z0-9_]+)` \|", (ROOT / "docs/probes.md").read_text(), re.MULTILINE)
    assert set(probes) == {each.name for each in CAPABILITIES}
    kernel = " ".join((ROOT / "docs/kernel.md").read_text().split())
    common = [each.name for each in CAPABILITIES if each.profiles == tuple(KernelProfile)]
    assert f"Common capabilities: {', '.join(common)}." in kernel
    own = [", ".join(each.name for each in CAPABILITIES if each.profiles == (profile,)) for profile in KernelProfile]
    assert f"| capabilities | {' | '.join(f'common + {names}' for names in own)} |" in kernel


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_are_named_exist() -> None:
    page = (ROOT / "docs/changing.md").read_text()
    named = re.findall(r"`((?:vzrepro|recipes|tests)/[\w./-]*)`", page)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme


def test_the_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def test_module_table_names_every_module() -> None:
    page = (ROOT / "docs/design.md").read_text()
    for path in (ROOT / "vzrepro").iterdir():
        name = path.stem if path.suffix == ".py" else f"{path.name}/" if path.is_dir() else ""
        if name and name not in ("__init__", "__pycache__/"):
            assert f"`{name}`" in page, f"docs/design.md does not mention {name}"
