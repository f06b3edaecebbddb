"""Links that `update-alternatives` would make, read from postinsts as Debian's packages have them."""

from __future__ import annotations

import io
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.debs import ar, deb, file, member, tar, write
from tests.unit.test_image import PLATFORM, layer
from vzrepro.base.errors import UsageError
from vzrepro.sources.alternatives import Alternative, chosen, read
from vzrepro.sources.deb import control_file
from vzrepro.sources.image import write_image

AUTOMAKE = """
set -e
ver=1.17
prio=35
update-alternatives --install /usr/bin/automake automake \\
\t/usr/bin/automake-$ver ${prio} \\
\t--slave /usr/bin/aclocal aclocal /usr/bin/aclocal-$ver \\
\t--slave /usr/share/man/man1/automake.1.gz automake.1.gz \\
\t/usr/share/man/man1/automake-$ver.1.gz
"""
WHICH = """
ua() {
\tupdate-alternatives --install /usr/bin/which which /usr/bin/which.debianutils 0
}
case "$1" in (configure) ua ;; esac
"""
XZ = """
update-alternatives --install /usr/bin/lzma lzma /usr/bin/xz 20 $(
\tslave /usr/bin unlzma unxz
)
"""
OTHER = """
# update-alternatives --install /usr/bin/no no /usr/bin/no 1
update-alternatives --quiet --install "/usr/bin/vi" vi '/usr/bin/vim tiny' 15 || true
update-alternatives --remove rename /usr/bin/prename
for i in a b; do update-alternatives --install /usr/bin/$i $i /usr/bin/x-$i 10; done
update-alternatives --install /usr/bin/../x x /usr/bin/y 10
update-alternatives --install /usr/bin/short short
update-alternatives --install /usr/bin/odd odd /usr/bin/y many
update-alternatives --install /usr/bin/open open "/usr/bin/y 10
"""


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (
            AUTOMAKE,
            [
                Alternative(
                    "/usr/bin/automake",
                    "/usr/bin/automake-1.17",
                    35,
                    (
                        ("/usr/bin/aclocal", "/usr/bin/aclocal-1.17"),
                        ("/usr/share/man/man1/automake.1.gz", "/usr/share/man/man1/automake-1.17.1.gz"),
                    ),
                )
            ],
        ),
        (WHICH, [Alternative("/usr/bin/which", "/usr/bin/which.debianutils", 0)]),
        (XZ, [Alternative("/usr/bin/lzma", "/usr/bin/xz", 20)]),
        (OTHER, [Alternative("/usr/bin/vi", "/usr/bin/vim tiny", 15)]),
        ("", []),
    ],
)
def test_postinsts(script: str, found: list[Alternative]) -> None:
    assert list(read(script)) == found


@given(
    st.lists(st.sampled_from([*"\\\n\"'$`();|=# ", "update-alternatives ", "--install ", "--slave ", "/a ", "a ", "9"]))
)
def test_any_script_is_read(words: list[str]) -> None:
    for each in read("".join(words)):
        assert each.link == each.path == "/a"


def test_the_highest_priority_that_is_there_is_chosen() -> None:
    offered = [
        Alternative("/usr/bin/awk", "/usr/bin/mawk", 5, (("/usr/bin/nawk", "/usr/bin/mawk"),)),
        Alternative("/usr/bin/awk", "/usr/bin/gawk", 10, (("/usr/bin/nawk", "/usr/bin/gawk"), ("/man", "/gone"))),
        Alternative("/usr/bin/awk", "/usr/bin/absent", 99, (("/usr/bin/other", "/usr/bin/gawk"),)),
        Alternative("/usr/bin/vi", "/usr/bin/b", 1),
        Alternative("/usr/bin/vi", "/usr/bin/a", 1),
    ]
    expected = {"/usr/bin/awk": "/usr/bin/gawk", "/usr/bin/nawk": "/usr/bin/gawk", "/usr/bin/vi": "/usr/bin/a"}
    for order in (offered, offered[::-1]):
        assert chosen(order, {"/usr/bin/mawk", "/usr/bin/gawk", "/usr/bin/a", "/usr/bin/b"}.__contains__) == expected


def test_the_postinst_of_a_package() -> None:
    package = deb(file("usr/bin/x"), postinst=b"#!/bin/sh\n")
    assert control_file(io.BytesIO(package), "p", "postinst") == b"#!/bin/sh\n"
    assert control_file(io.BytesIO(package), "p", "prerm") is None
    assert control_file(io.BytesIO(deb()), "p", "postinst") is None
    damaged = ar(member("debian-binary", b"2.0\n"), member("control.tar.xz", b"no xz"))
    bare = ar(member("debian-binary", b"2.0\n"), member("data.tar.xz", lzma.compress(tar())))
    for broken in (b"", package[:100], damaged, bare):
        with pytest.raises(UsageError):
            control_file(io.BytesIO(broken), "p", "postinst")


def test_an_image_has_the_links_that_it_is_asked_for(tmp_path: Path) -> None:
    blas = b"update-alternatives --install /usr/lib/x/libblas.so.3 libblas.so.3-x /usr/lib/x/blas/libblas.so.3 10\n"
    packages = [
        write(
            tmp_path / "automake.deb",
            *(file(f"usr/bin/{name}-1.17") for name in ("automake", "aclocal")),
            postinst=AUTOMAKE.encode(),
        ),
        write(tmp_path / "blas.deb", file("usr/lib/x/blas/libblas.so.3"), postinst=blas),
        write(tmp_path / "which.deb", file("bin/which.debianutils"), file("usr/bin/xz"), postinst=WHICH.encode()),
    ]

    def links(**env: str) -> dict[str, str]:
        out = tmp_path / "out"
        out.unlink(missing_ok=True)
        write_image(packages, out, platform=PLATFORM, env={"image_format": "1", **env})
        top = ("bin", "lib", "lib64", "sbin")
        return {name: each.linkname for name, each in layer(out).items() if each.issym() and name not in top}

    assert links() == {}
    made = {
        "usr/bin/automake": "automake-1.17",
        "usr/bin/aclocal": "aclocal-1.17",
        "usr/bin/which": "which.debianutils",
        "usr/lib/x/libblas.so.3": "/usr/lib/x/blas/libblas.so.3",
    }
    assert links(alternatives="1") == made
    asked = {"/bin/unlzma": "/usr/bin/xz", "/usr/bin/which": "/usr/bin/xz"}
    assert links(links=json.dumps(asked)) == {"usr/bin/unlzma": "xz", "usr/bin/which": "xz"}
    assert links(alternatives="1", links=json.dumps(asked)) == {**made, "usr/bin/unlzma": "xz", "usr/bin/which": "xz"}
    with pytest.raises(UsageError, match=r"/bin/xz cannot be made\n.*which\.deb ships it"):
        links(links=json.dumps({"/bin/xz": "/usr/bin/which.debianutils"}))
    with pytest.raises(UsageError, match="/usr/bin/vi would lead nowhere"):
        links(links=json.dumps({"/usr/bin/vi": "/usr/bin/vim"}))
