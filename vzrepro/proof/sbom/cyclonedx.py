"""`Bill` → CycloneDX 1.6 JSON (ECMA-424, first edition).

`components` holds what is in the target, and nothing else: that is what scanners read. What only built it is under
`formulation`, where each built node is a workflow with its command and inputs. Both are in one `dependencies` graph.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import vzrepro
from vzrepro.base.model import FileHash, canonical_json
from vzrepro.proof.sbom.components import Bill, Component, ComponentKind, File

SPEC_VERSION = "1.6"

_TYPES: Mapping[ComponentKind, str] = {
    "build": "application",
    "image": "container",
    "deb": "library",
    "crate": "library",
    "source": "application",
    "local": "file",
    "set": "file",
}


def document(bill: Bill) -> dict[str, Any]:
    """The bill as a CycloneDX document. Equal bills give equal documents; the serial number is of the content."""
    inside = [each for each in bill.components if each.contained and each.ref != bill.root]
    outside = [each for each in bill.components if not each.contained]
    content: dict[str, Any] = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": _metadata(bill),
        "components": [_component(each) for each in inside],
        "dependencies": _dependencies(bill),
        "compositions": [{"aggregate": "complete", "assemblies": [bill.root], "dependencies": [bill.root]}],
        "formulation": [
            {
                "bom-ref": f"{bill.root}#formula",
                "components": [_component(each) for each in outside],
                "workflows": [_workflow(bill, each) for each in bill.components if each.command],
            }
        ],
    }
    if not content["formulation"][0]["workflows"]:
        del content["formulation"][0]["workflows"]
    return {"serialNumber": f"urn:uuid:{content_uuid(content)}", **content}


def content_uuid(content: Mapping[str, Any]) -> uuid.UUID:
    """A version 5 UUID of a document: other content is another document, the same content the same one everywhere."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"urn:vzrepro:sbom:{FileHash.of(canonical_json(content)).hex}")


def timestamp(bill: Bill) -> str:
    """The target's date, RFC 3339."""
    return datetime.fromtimestamp(bill.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _metadata(bill: Bill) -> dict[str, Any]:
    seed = {"vzrepro:seed:packages": bill.seed.packages, "vzrepro:seed:bytes": bill.seed.bytes}
    seed |= {f"vzrepro:seed:{image.target}:packages": image.packages for image in bill.seed.images}
    return {
        "timestamp": timestamp(bill),
        "lifecycles": [{"phase": "build" if bill.output else "pre-build"}],
        "tools": {"components": [{"type": "application", "name": "vzrepro", "version": vzrepro.__version__}]},
        "component": _component(
            bill.target,
            **{"vzrepro:narHash": f"sha256:{bill.output.nar_hash.hex}", "vzrepro:narSize": bill.output.nar_size}
            if bill.output
            else {},
        ),
        "properties": _properties(seed),
    }


def _component(component: Component, **more: object) -> dict[str, Any]:
    drawn: dict[str, Any] = {"bom-ref": component.ref, "type": _TYPES[component.kind], "name": component.name}
    if component.version is not None:
        drawn["version"] = component.version
    if component.purl is not None:
        drawn["purl"] = component.purl
    if component.kind == "deb":
        drawn["supplier"] = {"name": "Debian"}
    if component.kind != "local":
        drawn["scope"] = "required" if component.contained else "excluded"
    if component.pin is not None:
        drawn["hashes"] = [{"alg": "SHA-256", "content": component.pin.sha256.hex}]
        # A name below mirror://, or the recipe's own URL: no host of this machine is ever written down.
        drawn["externalReferences"] = [{"type": "distribution", "url": component.pin.url}]
    elif component.place is not None:
        drawn["externalReferences"] = [{"type": "vcs", "url": component.place}]
    if component.license is not None:
        drawn["licenses"] = [{"expression": component.license, "acknowledgement": "declared"}]
    if component.files:
        drawn["components"] = [_file(component, file) for file in component.files]
    drawn["properties"] = _properties(
        {
            "vzrepro:kind": component.kind,
            "vzrepro:size": component.pin.size if component.pin else None,
            "vzrepro:drvHash": component.drv_hash,
            "vzrepro:storePath": component.store_path,
            "vzrepro:noLicense": component.note if component.license is None else None,
            **more,
        }
    )
    return drawn


def _file(component: Component, file: File) -> dict[str, Any]:
    return {
        "bom-ref": f"{component.ref}/{file.path}",
        "type": "file",
        "name": file.path,
        "hashes": [{"alg": "SHA-1", "content": file.sha1}, {"alg": "SHA-256", "content": file.sha256}],
        "properties": _properties({"vzrepro:kind": "file", "vzrepro:size": file.size}),
    }


def _dependencies(bill: Bill) -> list[dict[str, Any]]:
    return [
        {"ref": each.ref, **({"dependsOn": sorted(used)} if (used := _refs(bill, each)) else {})}
        for each in bill.components
    ]


def _refs(bill: Bill, component: Component) -> list[str]:
    return [ref for ref, _role in bill.uses.get(component.ref, ())]


def _workflow(bill: Bill, component: Component) -> dict[str, Any]:
    """How one node was built. What it was built with is named by role, so that nothing has to be inferred."""
    roles = bill.uses.get(component.ref, ())
    return {
        "bom-ref": f"{component.ref}#build",
        "uid": component.drv_hash,
        "name": component.name,
        "taskTypes": ["build"],
        "steps": [{"commands": [{"executed": shlex.join(component.command)}]}],
        "inputs": [
            {"resource": {"ref": ref}, "properties": _properties({"vzrepro:role": role})} for ref, role in roles
        ],
        "outputs": [{"type": "artifact", "resource": {"ref": component.ref}}],
    }


def _properties(values: Mapping[str, object]) -> list[dict[str, str]]:
    return [{"name": name, "value": str(value)} for name, value in sorted(values.items()) if value is not None]
