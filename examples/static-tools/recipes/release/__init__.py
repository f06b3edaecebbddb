"""release: the programs, their checksums, and a page that tells of them."""

import json

from recipes.crc import CRC
from recipes.rot13 import ROT13

from vzrepro import build, local, text
from vzrepro.recipes import tools_image

_ABOUT = {
    "crc": {"version": CRC.version, "about": "the CRC-32 of standard input"},
    "rot13": {"version": ROT13.version, "about": "turns letters by thirteen places"},
}

RELEASE = build(
    "release",
    image=tools_image(),
    inputs={
        "crc": CRC,
        "rot13": ROT13,
        "about.json": text("about.json", json.dumps(_ABOUT, sort_keys=True)),
        "src": local("page.py"),
    },
    command=["python3", "/in/src/page.py"],
    build_only=["about.json", "src"],
)
