"""`mirror://` names become URLs: configuration first, then the host's own clients, then public archives."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.sources.fetch import Mirrors
from vzrepro.sources.fetch.mirrors import PUBLIC, apt_places, cargo_index, parse

STAMP = "20260101T000000Z"
INDEX = "crates-io"


def test_the_variable_lists_places_in_order_of_preference() -> None:
    assert parse(" debian=https://one.example/debian\ncrates=file:///srv/crates debian=http://two.example/d ") == {
        "debian": ("https://one.example/debian", "http://two.example/d"),
        "crates": ("file:///srv/crates",),
    }


@pytest.mark.parametrize(
    "text", ["debian", "debian=mirror.example", "=https://x.example", "debian=ftp://x.example", "debian=http://["]
)
def test_a_malformed_variable_is_an_error_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="VZREPRO_MIRRORS") as caught:
        parse(text)
    assert "export VZREPRO_MIRRORS=" in str(caught.value)


def test_urls_stand_for_themselves() -> None:
    mirrors = Mirrors({})
    for url in ("https://a.example/x", "http://a.example/x", "file:///srv/x"):
        assert mirrors.urls(url) == (url,)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.example/x",
        "a.example/x",
        "https://",
        "mirror://debian",
        "mirror:///pool/x",
        "mirror://debian/pool/../../etc/passwd",
        "mirror://debian//x",
        "mirror://crates/only-a-name",
        "mirror://crates/name/1.0/more",
        "mirror://crates/na%2fme/1.0",
        "mirror://crates/name/latest",
    ],
)
def test_what_is_not_a_name_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        Mirrors({"debian": ["https://a.example/debian"]}).urls(url)


def test_configuration_then_apt_then_the_archive_of_the_locks_moment() -> None:
    mirrors = Mirrors(
        {"debian": ["https://first.example/debian/"]},
        apt={"debian": ["http://second.example/debian", "https://first.example/debian"], "debian-security": []},
    )
    urls = mirrors.urls("mirror://debian/pool/main/g/g++-13/g++-13_13.2.0-1~x_amd64.deb", snapshot=STAMP)
    path = "pool/main/g/g%2B%2B-13/g%2B%2B-13_13.2.0-1~x_amd64.deb"
    assert urls[:2] == (f"https://first.example/debian/{path}", f"http://second.example/debian/{path}")
    assert len(urls) == 3
    assert urls[2].startswith("https://snapshot.")
    assert urls[2].endswith(f"/archive/debian/{STAMP}/{path}")
    security = mirrors.urls("mirror://debian-security/pool/x.deb", snapshot=STAMP)
    assert [url.partition("/archive/")[2] for url in security] == [f"debian-security/{STAMP}/pool/x.deb"]
    assert mirrors.urls("mirror://debian/pool/x.deb") == (
        "https://first.example/debian/pool/x.deb",
        "http://second.example/debian/pool/x.deb",
    )


def test_a_malformed_snapshot_is_refused() -> None:
    with pytest.raises(UsageError, match="snapshot"):
        Mirrors({}).urls("mirror://debian/pool/x.deb", snapshot="../../x")


def test_a_name_without_place_says_how_to_give_it_one() -> None:
    with pytest.raises(UsageError) as caught:
        Mirrors({}).urls("mirror://ours/v6.x/linux-6.12.tar.xz")
    assert "export VZREPRO_MIRRORS='ours=" in str(caught.value)
    configured = Mirrors({"ours": ["https://ours.example/pub"]})
    assert configured.urls("mirror://ours/v6.x/l.tar.xz") == ("https://ours.example/pub/v6.x/l.tar.xz",)


def test_well_known_names_have_places_after_those_that_are_configured() -> None:
    configured = Mirrors({"kernel": ["https://kernel.example/pub"]})
    first, *public = configured.urls("mirror://kernel/linux/kernel/v6.x/linux-6.12.tar.xz")
    assert first == "https://kernel.example/pub/linux/kernel/v6.x/linux-6.12.tar.xz"
    assert public == [f"{place}/linux/kernel/v6.x/linux-6.12.tar.xz" for place in PUBLIC["kernel"]]


def test_a_file_at_several_places() -> None:
    mirrors = Mirrors({"ours": ["https://ours.example"]})
    places = ["mirror://nobody/x", "https://a.example/x", "mirror://ours/x", "https://a.example/x"]
    assert mirrors.urls_of_all(places) == ("https://a.example/x", "https://ours.example/x")
    with pytest.raises(UsageError, match="no place is known for mirror://nobody"):
        mirrors.urls_of_all(places[:1])


def test_crates_come_from_a_prefix_a_template_and_the_registry() -> None:
    mirrors = Mirrors({"crates": ["https://a.example/crates/", "https://b.example/api/{name}/{version}/download"]})
    one, two, public = mirrors.urls("mirror://crates/zstd-sys/2.0.16+zstd.1.5.7")
    assert one == "https://a.example/crates/zstd-sys/zstd-sys-2.0.16%2Bzstd.1.5.7.crate"
    assert two == "https://b.example/api/zstd-sys/2.0.16%2Bzstd.1.5.7/download"
    assert public.startswith("https://static.")
    assert public.endswith("/crates/zstd-sys/zstd-sys-2.0.16%2Bzstd.1.5.7.crate")


@pytest.mark.parametrize(
    ("template", "url"),
    [
        ("https://c.example/v1/crates", "https://c.example/v1/crates/Serde/1.0.0/download"),
        ("https://c.example/{crate}/{version}.crate", "https://c.example/Serde/1.0.0.crate"),
        ("https://c.example/{prefix}/{crate}-{version}", "https://c.example/Se/rd/Serde-1.0.0"),
        ("https://c.example/{lowerprefix}/{crate}-{version}", "https://c.example/se/rd/Serde-1.0.0"),
    ],
)
def test_a_sparse_index_says_where_its_crates_are_and_is_asked_once(template: str, url: str) -> None:
    asked: list[Sequence[str]] = []

    def get(urls: Sequence[str], _max_size: int) -> bytes:
        asked.append(urls)
        return f'{{"dl": "{template}"}}'.encode()

    mirrors = Mirrors({}, crate_index="https://c.example/index/", get=get)
    assert asked == []
    assert mirrors.urls("mirror://crates/Serde/1.0.0")[0] == url
    assert len(mirrors.urls("mirror://crates/Serde/1.0.1")) == 2
    assert asked == [["https://c.example/index/config.json"]]


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b'{"dl": 3}', b'{"dl": "ssh://x.example"}', b'{"dl": "http://["}', None]
)
def test_an_index_that_does_not_answer_well_only_loses_its_place(answer: bytes | None) -> None:
    def get(_urls: Sequence[str], _max_size: int) -> bytes:
        if answer is None:
            raise RemoteError("down")
        return answer

    mirrors = Mirrors({}, crate_index="https://c.example/index/", get=get)
    assert len(mirrors.urls("mirror://crates/serde/1.0.0")) == 1


def test_apts_one_line_and_deb822_sources_are_read(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://commented.example/debian trixie main\n"
        "deb http://a.example/debian trixie main # comment\n"
        "  deb-src [ arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg ] "
        "https://b.example/mirror/debian/ trixie main\n"
        "deb cdrom:[Debian]/ trixie main\n"
        "deb https://vendor.example/apt stable main\n"
    )
    (parts / "more.list").write_text("deb http://a.example/debian trixie-updates main\n")
    (parts / "ignored.save").write_text("deb http://saved.example/debian trixie main\n")
    (parts / "new.sources").write_text(
        "Types: deb\n# a comment\nURIs: http://c.example/debian\n# between\n  http://d.example/debian\n"
        "Suites: trixie\n\n"
        "Types: deb\nURIs: http://off.example/debian\nEnabled: no\n\n"
        "types: deb\nuris: https://c.example/debian-security/\n"
    )
    assert apt_places(tmp_path) == {
        "debian": (
            "http://a.example/debian",
            "https://b.example/mirror/debian/",
            "http://c.example/debian",
            "http://d.example/debian",
        ),
        "debian-security": ("https://c.example/debian-security/",),
    }


def test_others_who_publish_for_debian_are_no_mirrors_of_it(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "deb [signed-by=/etc/apt/keyrings/docker.asc] https://docker.example/linux/debian trixie stable\n"
        "deb https://other.example/debian trixie stable\n"
        "deb https://a.example/debian trixie main contrib\n"
    )
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "vendor.sources").write_text(
        "URIs: https://vendor.example/stable/debian\nSuites: trixie\nComponents: main\n"
        "Signed-By: /etc/apt/keyrings/v.gpg\n"
    )
    assert apt_places(tmp_path) == {"debian": ("https://a.example/debian",)}


def test_a_file_of_mirrors_is_read(tmp_path: Path) -> None:
    (tmp_path / "debian.list").write_text(
        "# a comment\nhttps://last.example/debian\nhttps://b.example/debian\tarch:amd64 priority:2\n\n"
        "http://a.example/debian priority:1\nhttps://not.example/ubuntu\n"
    )
    (tmp_path / "sources.list").write_text(
        f"deb mirror+file:{tmp_path}/debian.list trixie main\ndeb mirror+file://{tmp_path}/absent.list trixie main\n"
    )
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        f"Types: deb\nURIs: mirror+file://{tmp_path}/security.list\nSuites: trixie-security\nComponents: main\n"
    )
    (tmp_path / "security.list").write_text("https://c.example/debian-security\n")
    assert apt_places(tmp_path) == {
        "debian": ("http://a.example/debian", "https://b.example/debian", "https://last.example/debian"),
        "debian-security": ("https://c.example/debian-security",),
    }


def test_what_no_url_and_no_file_can_be_called_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "deb http://[/debian trixie main\ndeb mirror+file:/a%00b trixie main\ndeb http://a.example/debian trixie main\n"
    )
    assert apt_places(tmp_path) == {"debian": ("http://a.example/debian",)}


_WORDS = st.sampled_from(
    [
        "deb ",
        "deb-src ",
        "[",
        "]",
        " signed-by=",
        "http://[",
        "http://a/debian",
        "mirror+file:/",
        "%00",
        "main",
        "#",
        "URIs:",
        "Enabled: no",
        "Components: ",
        "Signed-By:",
        "\n",
        "\n\n",
        " ",
        "\t",
        "\0",
        "é",
    ]
)


@settings(max_examples=100)
@given(st.lists(_WORDS, max_size=12).map("".join))
def test_any_sources_of_apt_are_read(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder) / "sources.list.d"
        parts.mkdir()
        for path in (parts / "a.list", parts / "a.sources"):
            path.write_text(text)
        assert set(apt_places(Path(folder))) <= {"debian"}


@settings(max_examples=100)
@given(st.lists(_WORDS, max_size=6).map("".join))
def test_any_value_of_the_variable_is_read_or_an_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert all(place.startswith("http://") for places in parse(f"debian={text}").values() for place in places)


@settings(max_examples=100)
@given(
    st.recursive(
        st.sampled_from(["a", INDEX, "sparse+https://m.example", 1, True]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["source", "registries", INDEX, "a", "replace-with", "registry", "index"]), inner
            )
        ),
        max_leaves=6,
    )
)
def test_any_configuration_of_cargos_is_read(value: object) -> None:
    document = value if isinstance(value, dict) else {"source": {INDEX: value}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.toml").write_text(tomlkit.dumps(document))
        assert cargo_index(Path(folder)) in (None, "https://m.example/")


def test_a_host_that_is_no_debian_asks_the_archive_itself() -> None:
    (url,) = Mirrors({}).urls("mirror://debian/dists/trixie/InRelease")
    assert url.startswith("https://deb.")
    assert url.endswith("/debian/dists/trixie/InRelease")
    (moment,) = Mirrors({}).urls("mirror://debian/pool/x.deb", snapshot=STAMP)
    assert moment.endswith(f"/archive/debian/{STAMP}/pool/x.deb")


def test_a_host_without_apt_has_no_places(tmp_path: Path) -> None:
    assert apt_places(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("config", "index"),
    [
        (
            f'[source.{INDEX}]\nreplace-with = "m"\n[source.m]\nregistry = "sparse+https://m.example/index/"\n',
            "https://m.example/index/",
        ),
        (
            f'[source.{INDEX}]\nreplace-with = "a"\n[source.a]\nreplace-with = "b"\n'
            '[source.b]\nregistry = "sparse+https://m.example/index"\n',
            "https://m.example/index/",
        ),
        (
            f'[source.{INDEX}]\nreplace-with = "m"\n[registries.m]\nindex = "sparse+https://m.example/i/"\n',
            "https://m.example/i/",
        ),
        (f'[source.{INDEX}]\nregistry = "sparse+https://m.example/i/"\n', "https://m.example/i/"),
        (f'[source.{INDEX}]\nreplace-with = "a"\n[source.a]\nreplace-with = "a"\n', None),
        (f'[source.{INDEX}]\nreplace-with = "v"\n[source.v]\ndirectory = "vendor"\n', None),
        ("[build]\njobs = 2\n", None),
        ("not toml", None),
        (f'\ufeff[source.{INDEX}]\nregistry = "sparse+https://m.example/i/"\n', "https://m.example/i/"),
        ("x = " + "9" * 5000, None),
        ("x = " + "[" * 5000, None),
        ("source = 1", None),
        (f"[source]\n{INDEX} = 1", None),
        (f"[source.{INDEX}]\nreplace-with = [1]", None),
        (f"[source.{INDEX}]\nregistry = 1", None),
        (f'registries = 1\n[source.{INDEX}]\nreplace-with = "a"', None),
        (f'[registries]\na = 1\n[source.{INDEX}]\nreplace-with = "a"', None),
    ],
)
def test_cargos_source_replacement_is_followed(tmp_path: Path, config: str, index: str | None) -> None:
    (tmp_path / "config.toml").write_text(config)
    assert cargo_index(tmp_path) == index


def test_the_hosts_mirrors_put_the_variable_first(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://apt.example/debian trixie main\n")
    cargo = tmp_path / ".cargo"
    cargo.mkdir()
    (cargo / "config.toml").write_text(f'[source.{INDEX}]\nregistry = "sparse+https://m.example/i/"\n')

    def get(urls: Sequence[str], _max_size: int) -> bytes:
        assert urls == ["https://m.example/i/config.json"]
        return b'{"dl": "https://m.example/dl"}'

    mirrors = Mirrors.of_host(
        {"debian": ["https://configured.example/debian"]},
        {"HOME": str(tmp_path), "VZREPRO_MIRRORS": "debian=https://variable.example/debian"},
        get=get,
        etc_apt=tmp_path,
    )
    assert [url.split("/")[2] for url in mirrors.urls("mirror://debian/x")] == [
        "variable.example",
        "configured.example",
        "apt.example",
    ]
    assert mirrors.urls("mirror://crates/a/1.0.0")[0] == "https://m.example/dl/a/1.0.0/download"
