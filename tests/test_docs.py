"""Documentation is true: commands it shows parse, verbs it lists exist, links lead somewhere, none is left out."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from vzrepro import DSL
from vzrepro.cli import group
from vzrepro.cli.options import DefaultVerb

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


def test_every_recipe_function_is_documented() -> None:
    guide = (ROOT / "docs/recipes.md").read_text()
    for name in DSL:
        assert f"`{name}(" in guide


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


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
