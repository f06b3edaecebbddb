"""The formats a bill is written in, by the name users type, and their one byte form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vzrepro.proof.sbom import cyclonedx, spdx
from vzrepro.proof.sbom.components import Bill

FORMATS: Mapping[str, Callable[[Bill], dict[str, Any]]] = {"cyclonedx": cyclonedx.document, "spdx": spdx.document}
"""Name → from a bill to the document."""


def render(document: Mapping[str, Any]) -> str:
    """The document as JSON: keys sorted, indented by two, a newline at the end."""
    return json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
