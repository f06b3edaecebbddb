"""Two bills of materials → what changed, whichever of the two formats each is in, and whoever wrote it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal
from urllib.parse import unquote

from vzrepro.base.errors import UsageError

Use = Literal["contained", "built with"]


@dataclass(frozen=True, slots=True)
class Item:
    """A component as both formats know it.

    `key` is what stays when a component is updated: its purl without version, distribution and checksum; a name where
    there is no purl. `hash` is `<algorithm>:<hex>`, or what else tells the content (a store path).
    """

    key: str
    version: str | None
    hash: str | None
    license: str | None
    used: Use

    def __post_init__(self) -> None:
        for value in (self.key, self.version, self.hash, self.license):
            if not isinstance(value, str | None):
                raise TypeError(f"{value!r} is not a text")


@dataclass(frozen=True, slots=True)
class ComponentChange:
    """A component that is not the same in both: `before` None when it was added, `after` None when removed."""

    key: str
    before: Item | None
    after: Item | None

    @property
    def verb(self) -> Literal["added", "removed", "changed"]:
        """What happened to it."""
        return "added" if self.before is None else "removed" if self.after is None else "changed"

    @property
    def differences(self) -> Mapping[str, tuple[str | None, str | None]]:
        """Field of `Item` → before and after, of those that differ."""
        found = {}
        for name in (field.name for field in fields(Item) if field.name != "key"):
            one = getattr(self.before, name) if self.before else None
            other = getattr(self.after, name) if self.after else None
            if one != other:
                found[name] = (one, other)
        return found


_LIKENESSES: tuple[Callable[[Item], object], ...] = (
    lambda item: item,
    lambda item: item.hash,
    lambda item: item.version,
)
"""What tells which of several items of one key belong together, the surest first."""


def compare(before: Sequence[Item], after: Sequence[Item]) -> tuple[ComponentChange, ...]:
    """All changes, sorted by key. Items of one key that several versions have are told apart by version and content:
    one left over on each side was changed, more were added and removed."""
    grouped: defaultdict[str, tuple[list[Item], list[Item]]] = defaultdict(lambda: ([], []))
    for side, items in enumerate((before, after)):
        for item in items:
            grouped[item.key][side].append(item)
    changes: list[ComponentChange] = []
    for key in sorted(grouped):
        ones, others = grouped[key]
        for likeness in _LIKENESSES:
            for one in list(ones):
                # An absent hash or version is no likeness.
                match = next((other for other in others if likeness(other) == likeness(one) is not None), None)
                if match is not None:
                    ones.remove(one)
                    others.remove(match)
                    if match != one:
                        changes.append(ComponentChange(key, one, match))
        if len(ones) == len(others) == 1:
            changes.append(ComponentChange(key, ones[0], others[0]))
        else:
            changes += [ComponentChange(key, one, None) for one in _sorted(ones)]
            changes += [ComponentChange(key, None, other) for other in _sorted(others)]
    return tuple(changes)


def _sorted(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (item.version or "", item.hash or ""))


def parse(data: bytes, place: str) -> list[Item]:
    """The items of a CycloneDX or SPDX 2 JSON document; `place` is what errors call it. Raises UsageError."""
    try:
        document = json.loads(data)
        if isinstance(document, dict) and document.get("bomFormat") == "CycloneDX":
            return list(_cyclonedx(document))
        if isinstance(document, dict) and str(document.get("spdxVersion", "")).startswith("SPDX-2"):
            return list(_spdx(document))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON", reason=str(error), hint=_HINT) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{place} is not a bill of materials that can be read", reason=repr(error)) from error
    raise UsageError(f"{place} is neither CycloneDX nor SPDX 2", hint=_HINT)


_HINT = "name a target, or a JSON file that vzrepro sbom TARGET --format cyclonedx|spdx has written"


def _key(purl: str | None, name: str) -> str:
    """`pkg:deb/debian/bash?arch=amd64`; checksums and distributions change when the version does."""
    if purl is None:
        return name
    plain, _, query = purl.partition("#")[0].partition("?")
    kept = [pair for pair in query.split("&") if pair.startswith("arch=")]
    return unquote(plain.rpartition("@")[0] or plain) + ("?" if kept else "") + "&".join(kept)


# --- CycloneDX --------------------------------------------------------------------------------------------------------


def _cyclonedx(document: Mapping[str, Any]) -> Iterator[Item]:
    if root := document.get("metadata", {}).get("component"):
        yield from _cyclonedx_items([root], "", "contained")
    yield from _cyclonedx_items(document.get("components", ()), "", "contained")
    for formula in document.get("formulation", ()):
        yield from _cyclonedx_items(formula.get("components", ()), "", "built with")


def _cyclonedx_items(components: Sequence[Mapping[str, Any]], above: str, used: Use) -> Iterator[Item]:
    for component in components:
        name = above + (f"{component['group']}/" if component.get("group") else "") + component["name"]
        own: Use = "built with" if component.get("scope") == "excluded" else used
        properties = {each["name"]: each.get("value") for each in component.get("properties", ())}
        hashes = {each["alg"]: each["content"] for each in component.get("hashes", ())}
        yield Item(
            _key(component.get("purl"), name),
            component.get("version"),
            _hash({algorithm.replace("-", ""): value for algorithm, value in hashes.items()})
            or _built(properties.get("vzrepro:storePath"), properties.get("vzrepro:narHash")),
            _cyclonedx_license(component.get("licenses", ())),
            own,
        )
        yield from _cyclonedx_items(component.get("components", ()), f"{name}/", own)


def _cyclonedx_license(licenses: Sequence[Mapping[str, Any]]) -> str | None:
    found = []
    for each in licenses:
        named = each.get("license", {})
        found.append(each.get("expression") or named.get("id") or named.get("name"))
    return " AND ".join(sorted(filter(None, found))) or None


def _hash(hashes: Mapping[str, str]) -> str | None:
    """SHA-256 if there is one, else the first by name."""
    for algorithm in ("SHA256", *sorted(hashes)):
        if algorithm in hashes:
            return f"{algorithm.lower()}:{hashes[algorithm]}"
    return None


def _built(path: str | None, nar_hash: str | None) -> str | None:
    return path if nar_hash is None else f"{path} {nar_hash}"


# --- SPDX -------------------------------------------------------------------------------------------------------------

_BUILD_RELATIONS = frozenset(
    {
        "BUILD_TOOL_OF",
        "BUILD_DEPENDENCY_OF",
        "DEV_TOOL_OF",
        "DEV_DEPENDENCY_OF",
        "TEST_OF",
        "TEST_TOOL_OF",
        "TEST_DEPENDENCY_OF",
    }
)
"""What makes its subject no part of its object."""


def _spdx(document: Mapping[str, Any]) -> Iterator[Item]:
    outside = _spdx_outside(document)
    names: dict[str, str] = {}
    for package in document.get("packages", ()):
        purls = [each["referenceLocator"] for each in _references(package, "purl")]
        names[package["SPDXID"]] = package["name"]
        store_path, nar_hash = (
            next((each["referenceLocator"] for each in _references(package, kind)), None)
            for kind in ("nix-store-path", "nix-nar-hash")
        )
        yield Item(
            _key(purls[0] if purls else None, package["name"]),
            package.get("versionInfo"),
            _hash(_checksums(package)) or _built(store_path, nar_hash),
            _spdx_license(package.get("licenseDeclared")) or _spdx_license(package.get("licenseConcluded")),
            "built with" if package["SPDXID"] in outside else "contained",
        )
    owners = {
        each["relatedSpdxElement"]: each["spdxElementId"]
        for each in document.get("relationships", ())
        if each["relationshipType"] == "CONTAINS"
    }
    for file in document.get("files", ()):
        owner = owners.get(file["SPDXID"], "")
        name = file["fileName"].removeprefix("./")
        yield Item(
            f"{names[owner]}/{name}" if owner in names else name,
            None,
            _hash(_checksums(file)),
            _spdx_license(file.get("licenseConcluded")),
            "built with" if owner in outside else "contained",
        )


def _references(package: Mapping[str, Any], kind: str) -> list[Mapping[str, str]]:
    return [each for each in package.get("externalRefs", ()) if each["referenceType"] == kind]


def _checksums(element: Mapping[str, Any]) -> dict[str, str]:
    return {each["algorithm"].replace("-", ""): each["checksumValue"] for each in element.get("checksums", ())}


def _spdx_license(value: str | None) -> str | None:
    return None if value in (None, "", "NOASSERTION", "NONE") else value


def _spdx_outside(document: Mapping[str, Any]) -> set[str]:
    """The elements that only built what the document describes: no way leads to them but by a build relation."""
    inwards: defaultdict[str, list[str]] = defaultdict(list)
    tools: set[str] = set()
    for each in document.get("relationships", ()):
        one, kind, other = each["spdxElementId"], each["relationshipType"], each["relatedSpdxElement"]
        if kind in _BUILD_RELATIONS:
            tools.add(one)
        elif kind.endswith(("_OF", "_BY")):
            inwards[other].append(one)
        else:
            inwards[one].append(other)
    if not tools:
        return set()
    roots = [*document.get("documentDescribes", ()), *inwards.get("SPDXRef-DOCUMENT", ())]
    inside, pending = set(roots), list(roots)
    while pending:
        for other in inwards.get(pending.pop(), ()):
            if other not in inside:
                inside.add(other)
                pending.append(other)
    return {package["SPDXID"] for package in document.get("packages", ())} - inside
