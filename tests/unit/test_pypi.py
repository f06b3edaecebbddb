"""Python packages: pages of indexes in both forms, which file of a series is taken, and what is not believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import Exchange, FaultyProxy, serves, status
from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import PinnedFile, SourcePin
from vzrepro.sources import fetch, pypi, simple
from vzrepro.sources.fetch.mirrors import python_index
from vzrepro.sources.lookup import Lookup

URL = "https://index.example/simple/my-thing/"
SHA = "ab" * 32


def _json(*files: dict[str, Any], version: str = "1.1") -> bytes:
    return json.dumps({"meta": {"api-version": version}, "name": "my-thing", "files": list(files)}).encode()


def _row(name: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": SHA}, **more}


def test_json_and_html_say_the_same() -> None:
    names = ["my_thing-1.0.tar.gz", "my_thing-1.0-py2.py3-none-any.whl", "my_thing-1.1.zip"]
    html = "".join(f'<a href="../../files/{name}#sha256={SHA}">{name}</a><br>' for name in names)
    one = simple.files(_json(*map(_row, names)), URL, "My.Thing")
    other = simple.files(f"<!DOCTYPE html><html><body>{html}</body>".encode(), URL, "my-thing")
    assert one == other
    assert [file.url for file in one] == [f"https://index.example/files/{name}" for name in names]
    assert [sorted(file.tags) for file in one] == [[], ["py2-none-any", "py3-none-any"], []]


def test_yanked_in_both_forms() -> None:
    rows = [_row(f"my_thing-1.{number}.tar.gz", yanked=value) for number, value in enumerate([False, True, "", "bad"])]
    html = b'<a href="my_thing-1.0.tar.gz">x</a><a href="my_thing-1.1.tar.gz" data-yanked="">x</a>'
    assert [file.yanked for file in simple.files(_json(*rows), URL, "my-thing")] == [False, True, True, True]
    assert [file.yanked for file in simple.files(html, URL, "my-thing")] == [False, True]


def test_what_is_passed_over() -> None:
    rows = [
        _row("other-1.0.tar.gz"),
        _row("my_thing-1.0.exe"),
        _row("my_thing-one.tar.gz"),
        _row("my_thing-1.0.whl"),
        _row("my_thing-1.0.tar.gz", url="ftp://x/my_thing-1.0.tar.gz"),
        _row("my_thing-1.0.tar.gz", hashes={"sha256": "zz"}),
    ]
    assert simple.files(_json(*rows), URL, "my-thing") == ()
    (without,) = simple.files(_json(_row("my_thing-1.0.tar.gz", hashes={"md5": "x"})), URL, "my-thing")
    assert without.sha256 is None


@pytest.mark.parametrize(
    "page",
    [b"", b"<html>not here</html>", b"{", b"{}", b'{"meta": {}, "files": []}', _json(version="2.0"), b"\xff", b"<![\0"],
)
def test_what_is_no_page(page: bytes) -> None:
    with pytest.raises(RemoteError, match="index"):
        simple.files(page, URL, "my-thing")


def test_a_link_that_leads_nowhere_is_passed_over() -> None:
    page = b'<a href="http://[">x</a><a href="my_thing-1.0.tar.gz">x</a>'
    assert [file.name for file in simple.files(page, URL, "my-thing")] == ["my_thing-1.0.tar.gz"]


_PIECES = st.lists(
    st.sampled_from(
        ['<a href="', '">', "http://", "[", "my_thing-1.0.tar.gz", "#sha256=", "<![", "<!--", "&#", "9" * 20]
    )
    | st.text(max_size=3)
).map(lambda pieces: "".join(pieces).encode())
_VALUES = st.sampled_from(
    [None, True, 1, "", "a", "http://[", "my_thing-1.0.tar.gz", "my_thing-1!9-py3-none-any.whl", []]
)


@given(
    st.binary(max_size=300)
    | _PIECES
    | st.dictionaries(st.sampled_from(["filename", "url", "hashes", "yanked"]), _VALUES).map(
        lambda fields: _json({"filename": "my_thing-1.0.tar.gz", "url": "x", **fields})
    )
)
def test_any_page_is_read_or_refused(page: bytes) -> None:
    try:
        simple.files(page, URL, "my-thing")
    except RemoteError as error:
        assert error.message


# --- which file ----------------------------------------------------------------------------------------------------


class Index:
    """An index on a real server; `add` publishes a file that holds its own name."""

    def __init__(self, server: FaultyProxy) -> None:
        self.server = server
        self.rows: list[dict[str, Any]] = []

    def add(self, *names: str, **more: Any) -> None:
        for name in names:
            data = name.encode()
            link = self.server.serve_at(f"files/{name}", serves(data))
            self.rows.append(
                {"filename": name, "url": link, "hashes": {"sha256": hashlib.sha256(data).hexdigest()}, **more}
            )
        self.server.heal()
        for row in self.rows:
            self.server.serve_at(f"files/{row['filename']}", serves(row["filename"].encode()))
        self.server.serve_at("simple/my-thing/", serves(_json(*self.rows)))
        self.server.on("*", status(404))


Resolve = Callable[..., SourcePin]


@pytest.fixture
def index() -> Any:
    with FaultyProxy() as server:
        yield Index(server)


@pytest.fixture
def resolve(index: Index, tmp_path: Path) -> Resolve:
    def run(series: str, wheel: str | None = None, name: str = "My.Thing") -> SourcePin:
        mirrors = fetch.Mirrors({"pypi": [f"{index.server.url}/simple"]}, get=fetch.get)
        mirrors.python_indexes = mirrors.python_indexes[:1]  # not the public one
        want = Want("pypi-source", name, "here", {"series": series, "wheel": wheel})
        return pypi.resolve(want, None, Lookup(mirrors, tmp_path, tmp_path / "downloads", 1 << 20))

    return run


@pytest.mark.parametrize(
    ("series", "version"),
    [
        ("1", "1.10"),
        ("1.2", "1.2.post1"),
        ("1.2.0", "1.2.post1"),
        ("1.2.post1", "1.2.post1"),
        ("2", "2.0"),
        ("3.0rc1", "3.0rc1"),
        ("1!1", "1!1.0"),
    ],
)
def test_the_newest_of_a_series(index: Index, resolve: Resolve, series: str, version: str) -> None:
    versions = ["1.2", "1.2.post1", "1.10", "1.9", "2.0", "2.1rc1", "3.0rc1", "1!1.0", "1.10+local"]
    index.add(*(f"my_thing-{each}.tar.gz" for each in versions))
    index.add("my_thing-1.11.tar.gz", yanked="broken")
    pin = resolve(series)
    assert pin.version == version
    name = f"my_thing-{version}.tar.gz"
    assert isinstance(pin.file, PinnedFile)
    assert pin.file.url == f"mirror://pypi/my-thing/{name}"
    assert (pin.file.sha256.hex, pin.file.size) == (hashlib.sha256(name.encode()).hexdigest(), len(name))


def test_wheels_by_their_tag(index: Index, resolve: Resolve) -> None:
    index.add("my_thing-1.0.tar.gz", "my_thing-1.0-py2.py3-none-any.whl", "my_thing-1.1-cp311-cp311-linux_x86_64.whl")
    pin = resolve("1", wheel="py3-none-any")
    assert pin.version == "1.0"
    assert isinstance(pin.file, PinnedFile)
    assert pin.file.url.endswith("/my_thing-1.0-py2.py3-none-any.whl")
    with pytest.raises(UsageError, match="no wheel for cp312-cp312-linux_x86_64 in the series 1") as caught:
        resolve("1", wheel="cp312-cp312-linux_x86_64")
    assert "cp311-cp311-linux_x86_64" in (caught.value.hint or "")
    assert caught.value.reason == "the index has no wheel for cp312-cp312-linux_x86_64 of it"


def test_why_a_series_has_nothing(index: Index, resolve: Resolve) -> None:
    index.add("my_thing-1.0.tar.gz", yanked=True)
    index.add("my_thing-2.0rc1.tar.gz")
    for series, reason in (("1", "withdrawn 1.0"), ("2", "the index has 1.0, 2.0rc1"), ("x", "the index has 1.0")):
        with pytest.raises(UsageError, match=f"no source distribution in the series {series}") as caught:
            resolve(series)
        assert reason in (caught.value.reason or "")


def test_an_index_that_does_not_have_it(index: Index, resolve: Resolve) -> None:
    index.add("my_thing-1.0.tar.gz")
    with pytest.raises(RemoteError, match="no package index has other"):
        resolve("1", name="other")


def test_an_index_without_sha256(index: Index, resolve: Resolve) -> None:
    index.add("my_thing-1.0.tar.gz", hashes={"md5": "0" * 32})
    with pytest.raises(UsageError, match=r"no sha256 of my_thing-1\.0\.tar\.gz"):
        resolve("1")


def test_json_is_asked_for(index: Index, resolve: Resolve) -> None:
    index.add("my_thing-1.0.tar.gz")
    index.server.heal()

    def negotiated(exchange: Exchange) -> None:
        asked = exchange.headers["accept"].startswith("application/vnd.pypi.simple.v1+json")
        (serves(_json(*index.rows)) if asked else status(406))(exchange)

    index.server.serve_at("simple/my-thing/", negotiated)
    index.server.on("*", serves(b"my_thing-1.0.tar.gz"))
    assert resolve("1").version == "1.0"


def test_places_of_a_pinned_file(index: Index) -> None:
    index.add("my_thing-1.0.tar.gz")
    mirrors = fetch.Mirrors({"pypi": ["http://127.0.0.1:9/simple", f"{index.server.url}/simple"]}, get=fetch.get)
    mirrors.python_indexes = mirrors.python_indexes[1:2]
    assert mirrors.urls("mirror://pypi/my-thing/my_thing-1.0.tar.gz") == (
        f"{index.server.url}/files/my_thing-1.0.tar.gz",
    )
    with pytest.raises(RemoteError, match=r"no package index has my-thing/my_thing-2\.0\.tar\.gz") as caught:
        mirrors.urls("mirror://pypi/my-thing/my_thing-2.0.tar.gz")
    assert "VZREPRO_MIRRORS='pypi=" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="does not name a Python package"):
        mirrors.urls("mirror://pypi/my-thing")


def test_pips_own_settings_name_the_index(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert python_index({"PIP_INDEX_URL": "https://one.example/simple", **home}) == "https://one.example/simple"
    config = tmp_path / ".config/pip/pip.conf"
    config.parent.mkdir(parents=True)
    config.write_text("[global]\nindex-url = https://two.example/100%/simple\n")
    assert python_index(home) == "https://two.example/100%/simple"
    named = tmp_path / "named.conf"
    named.write_text("[global]\nindex-url=https://three.example\n")
    assert python_index({"PIP_CONFIG_FILE": str(named), **home}) == "https://three.example"
    named.write_text("nonsense")
    assert python_index({"PIP_CONFIG_FILE": str(named), **home}) == "https://two.example/100%/simple"
