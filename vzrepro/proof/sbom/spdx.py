"""`Bill` → SPDX 2.3 JSON (ISO/IEC 5962 and its successor; the specification's JSON schema).

Every component is a package; how one uses another is a relationship: CONTAINS, STATIC_LINK, GENERATED_FROM for what is
in the target, BUILD_TOOL_OF for what only built it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import vzrepro
from vzrepro.proof.sbom.components import Bill, Component, ComponentKind, File, Role
from vzrepro.proof.sbom.cyclonedx import content_uuid, timestamp
from vzrepro.proof.sbom.licences import DEBIAN_REF, refs

SPEC_VERSION = "SPDX-2.3"

_PURPOSES: Mapping[ComponentKind, str] = {
    "build": "APPLICATION",
    "image": "CONTAINER",
    "deb": "LIBRARY",
    "crate": "LIBRARY",
    "source": "SOURCE",
    "local": "FILE",
    "set": "ARCHIVE",
}

_NONE = "NOASSERTION"
_DOCUMENT = "SPDXRef-DOCUMENT"


def document(bill: Bill) -> dict[str, Any]:
    """The bill as an SPDX document. Equal bills give equal documents; the namespace is of the content."""
    content: dict[str, Any] = {
        "spdxVersion": SPEC_VERSION,
        "dataLicense": "CC0-1.0",
        "SPDXID": _DOCUMENT,
        "name": bill.target.name,
        "comment": _seed(bill),
        "creationInfo": {"created": timestamp(bill), "creators": [f"Tool: vzrepro-{vzrepro.__version__}"]},
        "packages": [_package(bill, each) for each in bill.components],
        "files": [_file(each, file) for each in bill.components for file in each.files],
        "relationships": _relationships(bill),
        "hasExtractedLicensingInfos": _licenses(bill),
    }
    empty = [key for key in ("files", "hasExtractedLicensingInfos") if not content[key]]
    for key in empty:
        del content[key]
    return {"documentNamespace": f"urn:uuid:{content_uuid(content)}", **content}


def _seed(bill: Bill) -> str:
    images = ", ".join(f"{image.target} ({image.packages})" for image in bill.seed.images)
    return (
        f"Trusted binary seed: {bill.seed.packages} Debian packages, {bill.seed.bytes} bytes"
        + (f", in the toolchain images {images}." if images else ".")
        + " What only built the target is related to it by BUILD_TOOL_OF alone."
    )


def _id(ref: str) -> str:
    """An SPDX identifier for a ref: readable, and told apart by a digest."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", ref.partition("?")[0].removeprefix("pkg:")).strip("-.")
    return f"SPDXRef-{words}-{hashlib.sha256(ref.encode()).hexdigest()[:12]}"


def _package(bill: Bill, component: Component) -> dict[str, Any]:
    drawn: dict[str, Any] = {
        "SPDXID": _id(component.ref),
        "name": component.name,
        "downloadLocation": component.place or _NONE,
        "filesAnalyzed": bool(component.files),
        "licenseConcluded": _NONE,
        "licenseDeclared": component.license or _NONE,
        "copyrightText": _NONE,
        "primaryPackagePurpose": _PURPOSES[component.kind],
    }
    if component.version is not None:
        drawn["versionInfo"] = component.version
    if component.kind == "deb":
        drawn["supplier"] = "Organization: Debian"
    if component.pin is not None:
        drawn["packageFileName"] = component.pin.url.removeprefix("mirror://")
        drawn["checksums"] = [{"algorithm": "SHA256", "checksumValue": component.pin.sha256.hex}]
        if component.pin.size is not None:
            drawn["comment"] = f"{component.pin.size} bytes"
    if component.files:
        # SPDX 2.3, 7.9: the SHA-1 of the files' SHA-1s, sorted and put together.
        digests = "".join(sorted(file.sha1 for file in component.files))
        code = hashlib.sha1(digests.encode(), usedforsecurity=False).hexdigest()
        drawn["packageVerificationCode"] = {"packageVerificationCodeValue": code}
        drawn["licenseInfoFromFiles"] = [_NONE]
    if component.license is None and component.note is not None:
        drawn["licenseComments"] = component.note
    references = [("PACKAGE-MANAGER", "purl", component.purl)]
    references += [("OTHER", "nix-store-path", component.store_path), ("OTHER", "vzrepro-drv-hash", component.drv_hash)]
    if bill.output is not None and component.ref == bill.root:
        references.append(("OTHER", "nix-nar-hash", f"sha256:{bill.output.nar_hash.hex}"))
    drawn["externalRefs"] = [
        {"referenceCategory": category, "referenceType": kind, "referenceLocator": locator}
        for category, kind, locator in references
        if locator is not None
    ]
    if not drawn["externalRefs"]:
        del drawn["externalRefs"]
    return drawn


def _file(component: Component, file: File) -> dict[str, Any]:
    return {
        "SPDXID": _id(f"{component.ref}/{file.path}"),
        "fileName": f"./{file.path}",
        "checksums": [
            {"algorithm": "SHA1", "checksumValue": file.sha1},
            {"algorithm": "SHA256", "checksumValue": file.sha256},
        ],
        "licenseConcluded": _NONE,
        "licenseInfoInFiles": [_NONE],
        "copyrightText": _NONE,
        "comment": f"{file.size} bytes",
    }


def _relationships(bill: Bill) -> list[dict[str, str]]:
    found = [(_DOCUMENT, "DESCRIBES", _id(bill.root))]
    for ref, used in bill.uses.items():
        found += [_relation(_id(ref), role, _id(other)) for other, role in used]
    for component in bill.components:
        found += [(_id(component.ref), "CONTAINS", _id(f"{component.ref}/{file.path}")) for file in component.files]
    return [{"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other} for one, kind, other in found]


def _relation(one: str, role: Role, other: str) -> tuple[str, str, str]:
    match role:
        case "contains":
            return one, "CONTAINS", other
        case "links":
            return one, "STATIC_LINK", other
        case "from":
            return one, "GENERATED_FROM", other
        case "tool":
            return other, "BUILD_TOOL_OF", one


def _licenses(bill: Bill) -> list[dict[str, str]]:
    names = {name for component in bill.components for name in refs(component.license or "")}
    return [
        {
            "licenseId": name,
            "name": name.removeprefix(DEBIAN_REF),
            "extractedText": f"What Debian's copyright files call {name.removeprefix(DEBIAN_REF)}. Its text stands in "
            "usr/share/doc/<package>/copyright of each package that names it, pinned by the package's checksum.",
        }
        for name in sorted(names)
    ]
