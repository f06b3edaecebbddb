"""`Lock` → lock.toml, through tomlkit, so that a person's comments survive `vzrepro lock`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import tomlkit
from tomlkit.items import Comment, InlineTable, Item, Key, Table, Whitespace

from vzrepro.base.model import FORMAT
from vzrepro.recipe.lock import Lock, PinnedFile, PinnedTree

HEADER = "Written by `vzrepro lock`. Comments are kept; edit recipes, not pins."


def render(lock: Lock, previous: str = "") -> str:
    """The text of `lock`; comments of `previous` stay with the lines they stood before or behind."""
    document = tomlkit.parse(previous)
    fresh = not previous.strip()
    if fresh:
        document.add(tomlkit.comment(HEADER))
        document.add(tomlkit.nl())
    document["format"] = FORMAT
    for section, content in _plain(lock).items():
        if content:
            _merge(document, section, content, inline=section in ("deb", "crate"))
        elif section in document:
            del document[section]
    return tomlkit.dumps(document)


def _plain(lock: Lock) -> dict[str, dict[str, Any]]:
    """The lock as nested plain tables, unsorted."""

    def pin(file: PinnedFile) -> dict[str, Any]:
        return {"sha256": file.sha256.hex, "size": file.size or 0}

    def what(file: PinnedFile | PinnedTree) -> dict[str, Any]:
        if isinstance(file, PinnedFile):
            return pin(file)
        return {"commit": file.commit, "sha256": file.nar_hash.hex, "size": file.size}

    images: dict[str, dict[str, Any]] = {}
    debs: dict[str, Any] = {}
    for (name, platform), image in lock.images.items():
        files = {}
        for deb in image.debs:
            url = deb.file.url.removeprefix("mirror://")
            files[deb.key] = url
            debs[url] = {"name": deb.name, "version": deb.version, "arch": deb.arch, **pin(deb.file)}
        images.setdefault(name, {})[platform] = {"request": image.request, "snapshot": image.snapshot, "debs": files}
    crates: dict[str, Any] = {}
    sets: dict[str, Any] = {}
    for name, crate_set in lock.crate_sets.items():
        keys = {crate.key: f"{crate.name}/{crate.version}" for crate in crate_set.crates}
        sets[name] = {"request": crate_set.request, "files": keys}
        crates.update({f"{crate.name}/{crate.version}": pin(crate.file) for crate in crate_set.crates})
    sources = {
        name: {"request": source.request, "version": source.version, "url": source.file.url, **what(source.file)}
        for name, source in lock.sources.items()
    }
    return {"source": sources, "image": images, "deb": debs, "crates": sets, "crate": crates}


def _merge(parent: Any, name: str, content: Mapping[str, Any], *, inline: bool) -> None:
    """Write `content` into the table `parent[name]`, sorted, each key with the comments it had."""
    old = parent.get(name)
    table = tomlkit.table()
    notes, trailing = _comments(old) if isinstance(old, Table) else ({}, [])
    for key in _ordered(content):
        value = content[key]
        for note in notes.get(key, []):
            table.add(note)
        if not isinstance(value, Mapping):
            item = tomlkit.item(value)
        elif inline:
            item = _inline(value)
        else:
            existing = old.get(key) if isinstance(old, Table) else None
            holder = tomlkit.table()
            if isinstance(existing, Table):
                holder[key] = existing
            _merge(holder, key, value, inline=False)
            item = holder[key]
        if isinstance(old, Table) and key in old:
            # A comment behind the old value stays on its line; a table's stays in its header.
            previous = old[key].trivia
            item.trivia.comment, item.trivia.comment_ws = previous.comment, previous.comment_ws
        table.add(key, item)
    if trailing:
        table.add(tomlkit.nl())
    for note in trailing:
        table.add(note)
    if isinstance(old, Table):
        table.trivia.comment, table.trivia.comment_ws = old.trivia.comment, old.trivia.comment_ws
    if all(isinstance(value, Mapping) for value in content.values()) and not inline:
        table = _super(table)
    parent[name] = table


def _super(table: Table) -> Table:
    """The same table, whose own `[header]` is left out because it only holds tables."""
    return Table(table.value, table.trivia, table.is_aot_element(), is_super_table=True)


def _ordered(content: Mapping[str, Any]) -> list[str]:
    """Plain values before tables (TOML demands it), each group sorted."""
    return sorted(content, key=lambda key: (isinstance(content[key], Mapping), key))


def _inline(value: Mapping[str, Any]) -> InlineTable:
    table = tomlkit.inline_table()
    for key in value:
        table.append(key, value[key])
    return table


def _comments(table: Table) -> tuple[dict[str, list[Comment]], list[Comment]]:
    """Comment lines by the key they stand before, and those after the last key."""
    notes: dict[str, list[Comment]] = {}
    pending: list[Comment] = []
    body: Iterable[tuple[Key | None, Item]] = table.value.body
    for key, item in body:
        if isinstance(item, Comment):
            pending.append(item)
        elif key is not None and not isinstance(item, Whitespace):
            notes[key.key] = pending
            pending = []
    return notes, pending
