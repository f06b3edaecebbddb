"""Verbs that only look: targets, show, why, graph, log."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from vzrepro.base.errors import VzreproError
from vzrepro.base.events import Notice
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.console import clean

if TYPE_CHECKING:
    from vzrepro.base.model import DrvHash
    from vzrepro.recipe.graph import DrvGraph, Node
    from vzrepro.recipe.plan import FieldChange


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also images and sources.")
@json_option
@click.pass_obj
def targets(session: Session, everything: bool) -> None:
    """List what can be realized."""
    rows = [
        (node.target, node.version or None, node.path.base, "yes" if session.store.query(node.path) else "no")
        for node in session.graph.targets.values()
        if everything or node.kind == "recipe"
    ]
    text = session.console.print_table(("target", "version", "store path", "here"), rows)
    if text is not None and not everything:
        session.remember(["targets"], text)


@click.command()
@click.argument("target", shell_complete=complete_targets)
@json_option
@click.pass_obj
def show(session: Session, target: str) -> None:
    """Show TARGET's derivation: everything its hash is made of."""
    node = session.target(target)
    document: dict[str, Any] = {
        "target": node.target,
        "recipe": node.place,
        "store_path": str(node.path),
        "drv_hash": node.drv_hash.hex,
        "derivation": node.drv.document(),
        "files": {name: {"url": file.url, "size": file.size} for name, file in node.files.items()},
        "checkout": None if node.checkout is None else {"url": node.checkout.url, "commit": node.checkout.commit},
        "timeout_secs": node.timeout_secs,
        "memory_bytes": node.memory_bytes,
        "disk_bytes": node.disk_bytes,
    }
    session.console.print_text(json.dumps(document, indent=2, ensure_ascii=False), document)


@click.command()
@click.argument("target", shell_complete=complete_targets)
@json_option
@click.pass_obj
def why(session: Session, target: str) -> None:
    """Explain why TARGET would be realized. Tells what changed since its recipe was realized before."""
    from vzrepro.recipe import plan

    node = session.target(target)
    console = session.console
    steps = plan.make_plan(session.graph, [node], session.inventory()).steps
    step = next(step for step in steps if step.node.drv_hash == node.drv_hash)
    found = plan.why(session.graph, node, session.store)
    document = {"target": node.target, "action": step.verb, "reason": step.reason, "changes": changes_document(found)}
    lines = [f"{node.target}: {step.verb}: {step.reason}"]
    if not found and step.verb != "have":
        lines.append("it was never realized here before, so there is nothing to compare with")
    lines += changes_lines(found, "the one realized before")
    console.print_text("\n".join(lines), document)


def changes_document(found: list[tuple[str, list[FieldChange]]]) -> list[dict[str, Any]]:
    """What `plan.why` has found, as plain data."""
    return [
        {"target": name, "field": change.field, "before": change.before, "after": change.after}
        for name, changes in found
        for change in changes
    ]


def changes_lines(found: list[tuple[str, list[FieldChange]]], before: str) -> list[str]:
    """What `plan.why` has found, for people; `before` says what was compared with."""
    lines = []
    for name, changes in found:
        lines.append(f"{name}, compared with {before}:")
        lines += [f"  {change.field}: {_as_json(change.before)} → {_as_json(change.after)}" for change in changes]
    return lines


def _as_json(value: object) -> str:
    return "absent" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@click.command()
@click.argument("target", shell_complete=complete_targets)
@click.option("--format", "form", type=click.Choice(["text", "dot", "mermaid", "json"]), default="text")
@click.pass_obj
def graph(session: Session, target: str, form: str) -> None:
    """Draw what TARGET is built from."""
    node = session.target(target)
    nodes = session.graph.closure([node])
    session.console.print_text(_DRAWINGS[form](session.graph, node, nodes))


def _text(graph: DrvGraph, root: Node, _nodes: Sequence[Node]) -> str:
    lines: list[str] = []
    shown: set[DrvHash] = set()

    def draw(node: Node, lead: str, branch: str, name: str) -> None:
        label = f"{name}: {node.target}" if name and name != node.target else node.target
        again = node.drv_hash in shown
        inputs = _inputs(graph, node)
        lines.append(f"{lead}{branch}{label} ({node.drv.builder}){' …' if again and inputs else ''}")
        if again:
            return
        shown.add(node.drv_hash)
        deeper = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for number, (key, dep) in enumerate(inputs):
            draw(dep, deeper, "└─ " if number == len(inputs) - 1 else "├─ ", key)

    draw(root, "", "", "")
    return "\n".join(lines)


def _inputs(graph: DrvGraph, node: Node) -> list[tuple[str, Node]]:
    image = [("image", graph.nodes[node.drv.image])] if node.drv.image else []
    return image + [(name, graph.nodes[drv]) for name, drv in sorted(node.drv.inputs.items())]


def _dot(graph: DrvGraph, root: Node, nodes: Sequence[Node]) -> str:
    lines = [f'digraph "{root.target}" {{', "  rankdir=LR;", "  node [shape=box];"]
    lines += [f'  "{node.path.base}" [label="{node.target}"];' for node in nodes]
    lines += [
        f'  "{node.path.base}" -> "{dep.path.base}" [label="{name}"];'
        for node in nodes
        for name, dep in _inputs(graph, node)
    ]
    return "\n".join([*lines, "}"])


def _mermaid(graph: DrvGraph, _root: Node, nodes: Sequence[Node]) -> str:
    short = {node.drv_hash: f"n{number}" for number, node in enumerate(nodes)}
    lines = ["graph LR", *(f'  {short[node.drv_hash]}["{node.target}"]' for node in nodes)]
    lines += [
        f"  {short[node.drv_hash]} -->|{name}| {short[dep.drv_hash]}"
        for node in nodes
        for name, dep in _inputs(graph, node)
    ]
    return "\n".join(lines)


def _json(graph: DrvGraph, root: Node, nodes: Sequence[Node]) -> str:
    document = {
        "root": root.drv_hash.hex,
        "nodes": {
            node.drv_hash.hex: {
                "target": node.target,
                "builder": node.drv.builder,
                "store_path": str(node.path),
                "inputs": {name: dep.drv_hash.hex for name, dep in _inputs(graph, node)},
            }
            for node in nodes
        },
    }
    return json.dumps(document, indent=2)


_DRAWINGS: dict[str, Callable[[DrvGraph, Node, Sequence[Node]], str]] = {
    "text": _text,
    "dot": _dot,
    "mermaid": _mermaid,
    "json": _json,
}


@click.command()
@click.argument("target", shell_complete=complete_targets)
@click.pass_obj
def log(session: Session, target: str) -> None:
    """Print the log of TARGET's last build, from here or a cache."""
    path = session.path(target)
    local = session.store.log_path(path)
    if local.is_file():
        with local.open(encoding="utf-8", errors="replace") as lines:
            session.console.print_lines(clean(part) for line in lines for part in line.splitlines())
        return
    text = next((text for cache in session.caches if (text := cache.log(path)) is not None), None)
    if text is not None:
        session.console.print_lines(map(clean, text.decode(errors="replace").splitlines()))
        return
    if target in session.graph.targets:
        from vzrepro.farm.livelog import failed_log

        drv = session.graph.find(target).drv_hash
        text = next(
            (text for cache in session.shared_caches if (text := failed_log(cache.access, drv, path.name))), None
        )
        if text is not None:
            session.console.report(Notice("info", f"this is the log of a build of {target} that failed on the farm"))
            session.console.print_lines(map(clean, text.decode(errors="replace").splitlines()))
            return
    raise VzreproError(
        f"there is no log of {target}",
        reason="it was not built in the sandbox on this machine, and no cache has its log",
        hint=f"build it with: vzrepro realize {target} --no-substitute",
    )
