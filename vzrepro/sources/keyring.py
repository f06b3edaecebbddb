"""Debian's archive keys, as Debian itself publishes them: by these `vzrepro lock` knows a suite's InRelease.

The file is that of a package, byte for byte, so that anybody can compare it with Debian's:

    package  debian-archive-keyring 2025.1, pool/main/d/debian-archive-keyring/debian-archive-keyring_2025.1_all.deb
    sha256   9ea7778e443144ca490668737a8ab22dd3e748bb99e805e22ec055abeb3c7fac
    file     usr/share/keyrings/debian-archive-keyring.pgp
    sha256   506b815cbb32d9b6066b4a2aa524071e071761e7e7f68c3ac74f3061ba852017

The keys of Debian 11, 12 and 13: archive, security archive and stable release.
"""

from __future__ import annotations

from pathlib import Path

KEYRING = Path(__file__).with_name("debian-archive-keyring.pgp")
"""The keys; `debian-keyring` of the configuration names others."""
