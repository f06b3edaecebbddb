"""Resolving from Debian indexes: signatures and hashes first, then who needs whom, then which source."""

from __future__ import annotations

import datetime as dt
import email.utils
import hashlib
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pysequoia
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import HashMismatch, RemoteError, Untrusted, UsageError
from vzrepro.sources import keyring
from vzrepro.sources.debian import Deb, Index, Suite, suites

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
MADE = dt.datetime(2026, 11, 20, 1, 2, 3, tzinfo=dt.UTC)
KEY = pysequoia.Tsk.generate("Test Archive <archive@example.org>")
OTHER = pysequoia.Tsk.generate("Somebody Else <other@example.org>")
KEYRING = bytes(KEY.extract_certificate())


def package(name: str, version: str = "1.0", arch: str = "amd64", **fields: str) -> dict[str, str]:
    """A Packages stanza; keyword `Multi_Arch="foreign"` becomes the field `Multi-Arch`."""
    return {
        "Package": name,
        "Version": version,
        "Architecture": arch,
        "Description": "a test\n package: not a field\n .",
        "Filename": f"pool/main/{name[0]}/{name}/{name}_{version}_{arch}.deb",
        "Size": "42",
        "SHA256": hashlib.sha256(f"{name}{version}{arch}".encode()).hexdigest(),
        **{key.replace("_", "-"): value for key, value in fields.items()},
    }


def source(name: str, version: str, *files: str) -> dict[str, str]:
    sums = "".join(f"\n {hashlib.sha256(file.encode()).hexdigest()} {len(file)} {file}" for file in files)
    return {"Package": name, "Version": version, "Checksums-Sha256": sums, "Directory": f"pool/main/{name[0]}/{name}"}


@dataclass
class Archive:
    """A mirror in memory. Each suite has stanzas per index file (`binary-amd64`, `source`)."""

    stanzas: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]
    release: dict[str, str] = field(default_factory=dict)
    signers: tuple[pysequoia.Tsk, ...] = (KEY,)
    asked: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, (name, indexes) in enumerate(self.stanzas.items()):
            base = f"mirror://{'debian-security' if name.endswith('-security') else 'debian'}/dists/{name}"
            lines = ""
            for kind in ("binary-amd64", "binary-arm64", "source"):
                file = "Sources" if kind == "source" else "Packages"
                text = "\n".join(
                    "".join(f"{key}: {value}\n" for key, value in stanza.items()) for stanza in indexes.get(kind, ())
                ).encode("utf-8", "surrogateescape")
                packed = lzma.compress(text, preset=0)
                digest = hashlib.sha256(packed).hexdigest()
                lines += f"\n {hashlib.sha256(text).hexdigest()} {len(text)} main/{kind}/{file}"
                lines += f"\n {digest} {len(packed)} main/{kind}/{file}.xz"
                self.files[f"{base}/main/{kind}/by-hash/SHA256/{digest}"] = packed
                self.files[f"{base}/main/{kind}/{file}.xz"] = packed
            fields = {
                "Origin": "Debian",
                "Suite": "stable",
                "Codename": name,
                "Date": email.utils.format_datetime(MADE + dt.timedelta(days=number), usegmt=True),
                "Acquire-By-Hash": "yes",
                "SHA256": lines,
                **self.release,
            }
            text = "".join(f"{key}: {value}\n" for key, value in fields.items() if value != "absent").encode()
            signed = text
            for signer in self.signers[:1]:
                signed = pysequoia.sign(signer.signer(), text, mode=pysequoia.SignatureMode.CLEAR)
            self.files[f"{base}/InRelease"] = signed

    def download(self, url: str) -> bytes:
        self.asked.append(url)
        return self.files[url]

    def index(self, keyring: bytes = KEYRING, now: dt.datetime = NOW, allow_expired: bool = False) -> Index:
        chosen = [Suite(name, "debian-security" if name.endswith("-security") else "debian") for name in self.stanzas]
        return Index(self.download, keyring, suites=chosen, now=now, allow_expired=allow_expired)


def trixie(*stanzas: Mapping[str, str], arm64: Sequence[Mapping[str, str]] = ()) -> Index:
    both = [stanza for stanza in stanzas if stanza["Architecture"] == "all"]
    return Archive({"trixie": {"binary-amd64": stanzas, "binary-arm64": [*arm64, *both]}}).index()


def names(debs: Sequence[Deb]) -> list[str]:
    return [deb.name if deb.arch in ("amd64", "all") else f"{deb.name}:{deb.arch}" for deb in debs]


# --- trust --------------------------------------------------------------------------------------------------------


def test_a_deb_is_exact_and_its_url_names_no_mirror() -> None:
    stanza = package("dash", "0.5+b1", Multi_Arch="foreign")
    (deb,) = trixie(stanza).resolve(["dash"])
    assert deb.url == "mirror://debian/pool/main/d/dash/dash_0.5+b1_amd64.deb"
    assert (deb.version, deb.arch, deb.archive, deb.size) == ("0.5+b1", "amd64", "debian", 42)
    assert deb.sha256.hex == stanza["SHA256"]


def test_only_what_is_needed_is_fetched_and_by_hash() -> None:
    archive = Archive({"trixie": {"binary-amd64": [package("a")]}})
    index = archive.index()
    assert archive.asked == ["mirror://debian/dists/trixie/InRelease"]
    index.resolve(["a"])
    assert len(archive.asked) == 2
    assert archive.asked[1].startswith("mirror://debian/dists/trixie/main/binary-amd64/by-hash/SHA256/")


def test_without_by_hash_the_plain_path_is_used() -> None:
    archive = Archive({"trixie": {"binary-amd64": [package("a")]}}, {"Acquire-By-Hash": "absent"})
    archive.index().resolve(["a"])
    assert archive.asked[1] == "mirror://debian/dists/trixie/main/binary-amd64/Packages.xz"


def test_the_snapshot_is_the_newest_date_of_the_suites() -> None:
    index = Archive({"trixie": {}, "trixie-security": {}}).index()
    assert index.snapshot == "20261121T010203Z"
    assert index.dates == {"trixie": MADE, "trixie-security": MADE + dt.timedelta(days=1)}


def test_a_release_has_three_suites() -> None:
    assert [(suite.name, suite.archive) for suite in suites("trixie")] == [
        ("trixie", "debian"),
        ("trixie-updates", "debian"),
        ("trixie-security", "debian-security"),
    ]


@pytest.mark.parametrize("armoured", [True, False])
def test_one_known_key_of_several_suffices(armoured: bool) -> None:
    keys = [KEY.extract_certificate(), OTHER.extract_certificate()]
    ring = b"".join(bytes(key) for key in keys)
    if armoured:
        ring = pysequoia.armor(ring, kind=pysequoia.ArmorKind.PublicKey)
        ring = ring if isinstance(ring, bytes) else ring.encode()
        ring = b"A comment before the block.\n\n" + ring
    assert Archive({"trixie": {}}).index(keyring=ring).dates


def test_an_unknown_signer_is_refused_and_the_keyring_is_named() -> None:
    with pytest.raises(Untrusted, match="not signed by a known key") as caught:
        Archive({"trixie": {}}, signers=(OTHER,)).index()
    assert KEY.extract_certificate().fingerprint in (caught.value.reason or "")
    assert "backtrace" not in str(caught.value)


def test_an_unsigned_or_empty_release_is_refused() -> None:
    with pytest.raises(Untrusted):
        Archive({"trixie": {}}, signers=()).index()
    archive = Archive({"trixie": {}})
    archive.files["mirror://debian/dists/trixie/InRelease"] = b""
    with pytest.raises(Untrusted):
        archive.index()


def test_a_changed_release_is_refused() -> None:
    archive = Archive({"trixie": {}})
    url = "mirror://debian/dists/trixie/InRelease"
    archive.files[url] = archive.files[url].replace(b"Origin: Debian", b"Origin: Debiam")
    with pytest.raises(Untrusted):
        archive.index()


def test_text_around_the_signed_part_is_never_used() -> None:
    archive = Archive({"trixie": {}})
    url = "mirror://debian/dists/trixie/InRelease"
    forged = b"Codename: trixie\nDate: Thu, 01 Jan 2099 00:00:00 UTC\n\n"
    archive.files[url] = forged + archive.files[url] + forged
    assert archive.index().dates == {"trixie": MADE}


def test_a_keyring_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="keyring"):
        Archive({"trixie": {}}).index(keyring=b"not a key")


def test_another_suites_release_is_refused() -> None:
    with pytest.raises(Untrusted, match="another suite"):
        Archive({"trixie": {}}, {"Codename": "sid", "Suite": "unstable"}).index()


def test_an_expired_release_needs_the_override_which_still_checks_the_signature() -> None:
    until = {"Valid-Until": "Fri, 20 Nov 2026 00:00:00 UTC"}
    with pytest.raises(Untrusted, match="expired on 2026-11-20 00:00 UTC") as caught:
        Archive({"trixie": {}}, until).index()
    assert "allow_expired" in (caught.value.hint or "")
    assert Archive({"trixie": {}}, until).index(allow_expired=True).dates
    assert Archive({"trixie": {}}, until).index(now=MADE - dt.timedelta(days=1)).dates
    with pytest.raises(Untrusted, match="not signed"):
        Archive({"trixie": {}}, until, signers=(OTHER,)).index(allow_expired=True)


@pytest.mark.parametrize(
    "broken",
    [
        {"Date": "absent"},
        {"Date": "soon"},
        {"SHA256": "absent"},
        {"SHA256": "\n x 1 a"},
        {"SHA256": "\n a b"},
        {"Date": "Fri, 31 Dec 9999 23:59:59 -0100"},
    ],
)
def test_a_malformed_release_is_an_error_of_the_mirror(broken: dict[str, str]) -> None:
    with pytest.raises(RemoteError, match="malformed"):
        Archive({"trixie": {}}, broken).index()


def test_an_index_file_that_is_not_the_named_one_is_a_hash_mismatch() -> None:
    archive = Archive({"trixie": {"binary-amd64": [package("a")]}})
    for url in [url for url in archive.files if "by-hash" in url]:
        archive.files[url] = lzma.compress(b"Package: evil\n")
    with pytest.raises(HashMismatch, match="not the file") as caught:
        archive.index().resolve(["a"])
    assert "wanted" in (caught.value.reason or "") and "found" in (caught.value.reason or "")


def test_an_index_file_that_unpacks_to_more_is_refused_before_it_does() -> None:
    bomb = lzma.compress(bytes(1 << 20), preset=0)
    digest = hashlib.sha256(bomb).hexdigest()
    sums = f"\n {'0' * 64} 100 main/binary-amd64/Packages\n {digest} {len(bomb)} main/binary-amd64/Packages.xz"
    archive = Archive({"trixie": {}}, {"SHA256": sums})
    archive.files[f"mirror://debian/dists/trixie/main/binary-amd64/by-hash/SHA256/{digest}"] = bomb
    with pytest.raises(HashMismatch, match="does not unpack to 100 bytes"):
        archive.index().resolve(["a"])


def test_an_architecture_the_suite_lacks_is_an_error() -> None:
    with pytest.raises(UsageError, match="no main/binary-riscv64/Packages"):
        trixie(package("a")).resolve(["a:riscv64"])


def test_the_shipped_keyring_is_debians_own_and_has_trixies_keys() -> None:
    data = keyring.KEYRING.read_bytes()
    assert hashlib.sha256(data).hexdigest() in (keyring.__doc__ or "")
    found = {cert.fingerprint.upper() for cert in pysequoia.Cert.split_bytes(data)}
    assert found >= {"04B54C3CDCA79751B16BC6B5225629DF75B188BD", "5E04A1E3223A19A20706E20F9904613D4CCE68C6"}
    of_this_host = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if of_this_host.exists():  # Debian's own package, which may have more keys some day, or be an older one
        assert found & {cert.fingerprint.upper() for cert in pysequoia.Cert.split_bytes(of_this_host.read_bytes())}


# --- resolution ---------------------------------------------------------------------------------------------------


def test_depends_and_pre_depends_are_followed_and_recommends_are_not() -> None:
    index = trixie(
        package("a", Depends="b (>= 1), c", Pre_Depends="d", Recommends="e", Suggests="f"), *map(package, "bcdef")
    )
    assert names(index.resolve(["a"])) == ["a", "b", "c", "d"]


def test_the_highest_version_of_all_suites_wins_by_debians_rules() -> None:
    archive = Archive(
        {
            "trixie": {"binary-amd64": [package("a", "1.10-1"), package("b", "1:0.1")]},
            "trixie-updates": {"binary-amd64": [package("a", "1.9-1"), package("b", "2.0")]},
            "trixie-security": {"binary-amd64": [package("a", "1.10-1+deb13u1"), package("a", "1.10-1+deb13u1~x")]},
        }
    )
    a, b = archive.index().resolve(["b", "a"])
    assert (a.version, a.archive, b.version) == ("1.10-1+deb13u1", "debian-security", "1:0.1")
    assert a.url.startswith("mirror://debian-security/pool/")


@pytest.mark.parametrize(
    ("constraint", "ok"),
    [("= 1.0", True), (">= 1.0~", True), (">> 1.0", False), ("<< 1.0", False), ("<= 1.0", True), (">= 1.0-1", False)],
)
def test_version_constraints(constraint: str, ok: bool) -> None:
    index = trixie(package("a", Depends=f"b ({constraint})"), package("b"))
    if ok:
        assert names(index.resolve(["a"])) == ["a", "b"]
    else:
        with pytest.raises(UsageError, match=r"a:amd64 needs b \("):
            index.resolve(["a"])


def test_alternatives_first_that_can_be_unless_another_is_there_already() -> None:
    index = trixie(package("a", Depends="missing | old (>= 2) | x | y"), package("old"), package("x"), package("y"))
    assert names(index.resolve(["a"])) == ["a", "x"]
    assert names(index.resolve(["a", "y"])) == ["a", "y"]


def test_an_alternative_chosen_later_by_need_counts_too() -> None:
    index = trixie(
        package("a", Depends="x | y"), package("z", Depends="w"), package("w", Depends="y"), *map(package, "xy")
    )
    assert names(index.resolve(["a", "z"])) == ["a", "w", "y", "z"]


def test_provides_with_and_without_version() -> None:
    index = trixie(
        package("a", Depends="virtual"),
        package("b", Depends="virtual (>= 2)"),
        package("m-extra", Provides="virtual"),
        package("n-two", Provides="other, virtual (= 2.1)"),
        package("z-important", Provides="virtual (= 1)", Priority="important"),
    )
    assert names(index.resolve(["a"])) == ["a", "z-important"]
    assert names(index.resolve(["b"])) == ["b", "n-two"]
    assert names(index.resolve(["a", "b", "m-extra"])) == ["a", "b", "m-extra", "n-two"]


def test_provides_may_span_lines() -> None:
    assert names(trixie(package("a", Depends="v2"), package("p", Provides="v1,\n v2,\n v3")).resolve(["a"])) == [
        "a",
        "p",
    ]


def test_only_the_highest_version_of_a_provider_counts() -> None:
    archive = Archive(
        {
            "trixie": {"binary-amd64": [package("a", Depends="v"), package("p", "1", Provides="v")]},
            "trixie-updates": {"binary-amd64": [package("p", "2")]},
        }
    )
    with pytest.raises(UsageError, match="a:amd64 needs v,"):
        archive.index().resolve(["a"])


def test_left_out_packages_and_what_only_they_need() -> None:
    index = trixie(
        package("a", Depends="debconf (>= 0.5) | debconf-2.0, b"),
        package("b", Depends="v"),
        package("debconf", Provides="debconf-2.0", Depends="perl"),
        package("cdebconf", Provides="debconf-2.0"),
        package("p", Provides="v"),
        package("perl"),
    )
    assert names(index.resolve(["a"], without={"debconf": "only scripts ask", "p": "not run"})) == ["a", "b"]
    with pytest.raises(UsageError, match="asked for and left out") as caught:
        index.resolve(["debconf"], without={"debconf": "only scripts ask"})
    assert "only scripts ask" in str(caught.value)


def test_a_left_out_provider_gives_way_to_another() -> None:
    index = trixie(package("a", Depends="awk"), package("gawk", Provides="awk"), package("mawk", Provides="awk"))
    assert names(index.resolve(["a"], without={"gawk": "large"})) == ["a", "mawk"]


def test_foreign_packages_come_alone_unless_their_dependencies_are_wanted() -> None:
    index = trixie(
        package("tool", Multi_Arch="foreign"),
        package("data", arch="all", Multi_Arch="foreign"),
        package("libx", Multi_Arch="same"),
        arm64=[
            package("libx-dev", arch="arm64", Depends="libx (= 1.0), tool, data"),
            package("libx", arch="arm64", Multi_Arch="same"),
            package("tool", arch="arm64", Multi_Arch="foreign"),
        ],
    )
    assert names(index.resolve(["libx-dev:arm64"])) == ["libx-dev:arm64"]
    assert names(index.resolve(["libx-dev:arm64", "tool"], foreign_depends=True)) == [
        "data",
        "libx:arm64",
        "libx-dev:arm64",
        "tool",
    ]


def test_multi_arch_qualifiers() -> None:
    index = trixie(
        package("a", Depends="python:any, cross-libc:arm64"),
        package("python", Multi_Arch="allowed"),
        arm64=[package("cross-libc", arch="arm64", Depends="gone")],
    )
    assert names(index.resolve(["a"])) == ["a", "cross-libc:arm64", "python"]


def test_an_all_package_depends_on_native_ones_only() -> None:
    index = trixie(package("doc", arch="all", Depends="lib"), arm64=[package("lib", arch="arm64", Multi_Arch="same")])
    with pytest.raises(UsageError, match="doc needs lib"):
        index.resolve(["doc", "lib:arm64"])


def test_native_may_be_the_other_architecture() -> None:
    index = trixie(
        package("a", Depends="b"),
        package("b"),
        arm64=[package("a", arch="arm64", Depends="b"), package("b", arch="arm64")],
    )
    assert names(index.resolve(["a"], native="arm64")) == ["a:arm64", "b:arm64"]


def test_an_unknown_package_comes_with_the_nearest_names() -> None:
    with pytest.raises(UsageError, match="no package libsl-dev") as caught:
        trixie(package("libssl-dev"), package("gcc")).resolve(["libsl-dev"])
    assert "libssl-dev" in (caught.value.hint or "")


def test_an_unsatisfiable_dependency_names_the_chain_and_what_there_is() -> None:
    index = trixie(
        package("a", Depends="b"), package("b", Depends="c"), package("c", Depends="d (>= 2) | e"), package("d")
    )
    with pytest.raises(UsageError, match=r"c:amd64 needs d \(>= 2\) \| e, which nothing") as caught:
        index.resolve(["a"])
    assert "a:amd64 → b:amd64 → c:amd64" in (caught.value.reason or "")
    assert "d:amd64 is 1.0" in (caught.value.reason or "")


@pytest.mark.parametrize(
    "fields",
    [
        {"Filename": "../../etc/passwd"},
        {"Filename": "pool/../x.deb"},
        {"Size": "many"},
        {"Size": "-1"},
        {"Size": "9" * 5000},
        {"Version": "no version"},
        {"Version": "9" * 5000},
        {"Depends": "b (>= a:b:c é)"},
        {"SHA256": "0"},
        {"Depends": "(= 1)"},
    ],
)
def test_a_malformed_stanza_is_an_error_of_the_mirror(fields: dict[str, str]) -> None:
    with pytest.raises(RemoteError, match="package index"):
        trixie(package("a", **fields)).resolve(["a"])


FIELDS = st.text(st.sampled_from("ab1:.~-+()|,<=> \té\x00"), max_size=12) | st.just("9" * 5000)


@settings(max_examples=25)
@given(
    st.dictionaries(st.sampled_from(["Version", "Architecture", "Filename", "Size", "SHA256"]), FIELDS, max_size=2),
    st.dictionaries(st.sampled_from(["Depends", "Provides", "Multi-Arch", "Priority"]), FIELDS, max_size=2),
)
def test_any_stanza_is_read_or_an_error(needed: dict[str, str], more: dict[str, str]) -> None:
    index = trixie({**package("a"), **needed, **more}, package("b"))
    try:
        debs = index.resolve(["a", "b"])
    except (RemoteError, UsageError):
        return
    assert {deb.name for deb in debs} == {"a", "b"}


@settings(max_examples=25)
@given(
    st.dictionaries(st.sampled_from(["Version", "Directory"]), FIELDS, max_size=1),
    st.none() | st.builds(" {} {} {}".format, FIELDS, FIELDS, st.just("a_1.0.orig.tar.gz")),
)
def test_any_source_stanza_is_read_or_an_error(fields: dict[str, str], line: str | None) -> None:
    stanza = {**source("a", "1.0-1", "a_1.0.orig.tar.gz"), **fields}
    if line is not None:
        stanza["Checksums-Sha256"] = "\n" + line
    try:
        (found,) = sources(stanza).sources("a", "1")
    except (RemoteError, UsageError):
        return
    assert found.upstream.startswith("1")


def test_a_maintainer_whose_name_is_not_utf_8_harms_nobody() -> None:
    name = b"J\xf6rg".decode("utf-8", "surrogateescape")
    stanza = {**source("a", "1.0~ds1-1", "a_1.0~ds1.orig.tar.gz"), "Maintainer": name}
    assert sources(stanza).sources("a", "1.0~ds1")[0].upstream == "1.0~ds1"
    assert names(trixie(package("a", Maintainer=name)).resolve(["a"])) == ["a"]


LETTERS = "abcdefgh"


@st.composite
def worlds(draw: st.DrawFn) -> list[dict[str, str]]:
    """Small worlds in which everything can be satisfied: every alternative exists."""
    stanzas = []
    for name in LETTERS:
        groups = draw(st.lists(st.lists(st.sampled_from([*LETTERS, "v", "w"]), min_size=1, max_size=3), max_size=3))
        stanza = package(name, Depends=", ".join(" | ".join(group) for group in groups))
        if provides := draw(st.sets(st.sampled_from("vw"))):
            stanza["Provides"] = ", ".join(sorted(provides))
        stanzas.append(stanza)
    return [*stanzas, package("zz", Provides="v, w")]


@settings(max_examples=40)
@given(worlds(), st.permutations(LETTERS), st.integers(1, 4), st.sets(st.sampled_from(LETTERS), max_size=2))
def test_the_result_is_closed_stable_and_independent_of_order(
    world: list[dict[str, str]], order: list[str], count: int, left_out: set[str]
) -> None:
    requests = [name for name in order[:count] if name not in left_out]
    without = dict.fromkeys(left_out, "for the test")
    chosen = trixie(*world).resolve(requests, without=without)
    assert chosen == trixie(*reversed(world)).resolve(requests[::-1], without=without)
    assert list(chosen) == sorted(set(chosen))
    there = {deb.name for deb in chosen}
    assert set(requests) <= there and not there & left_out
    provided = {v for stanza in world if stanza["Package"] in there for v in stanza.get("Provides", "").split(", ")}
    excused = {v for stanza in world if stanza["Package"] in left_out for v in stanza.get("Provides", "").split(", ")}
    for stanza in world:
        if stanza["Package"] in there:
            for group in filter(None, stanza.get("Depends", "").split(", ")):
                assert set(group.split(" | ")) & (there | provided | left_out | excused), (stanza["Package"], group)
    assert trixie(*world).resolve([deb.name for deb in chosen], without=without) == chosen


# --- sources ------------------------------------------------------------------------------------------------------


def sources(*stanzas: Mapping[str, str]) -> Index:
    return Archive({"trixie": {"source": stanzas[:1]}, "trixie-security": {"source": stanzas[1:]}}).index()


def test_the_newest_source_of_a_series() -> None:
    index = sources(
        source("linux", "6.12.9-1", "linux_6.12.9.orig.tar.xz"),
        source(
            "linux",
            "6.12.117-1",
            "linux_6.12.117-1.dsc",
            "linux_6.12.117.orig.tar.xz",
            "linux_6.12.117-1.debian.tar.xz",
        ),
        source("linux", "6.120.1-1", "linux_6.120.1.orig.tar.xz"),
        source("linux", "6.13~rc1-1", "linux_6.13~rc1.orig.tar.xz"),
        source("linux-doc", "6.12.999-1", "linux-doc_6.12.999.orig.tar.xz"),
    )
    found, *older = index.sources("linux", "6.12")
    assert [package.upstream for package in older] == ["6.12.9"]
    name = "linux_6.12.117.orig.tar.xz"
    assert (found.version, found.upstream) == ("6.12.117-1", "6.12.117")
    assert found.url == f"mirror://debian-security/pool/main/l/linux/{name}"
    assert (found.size, found.sha256.hex) == (len(name), hashlib.sha256(name.encode()).hexdigest())
    assert index.sources("linux", "6.12.9")[0].upstream == "6.12.9"


def test_a_source_with_an_epoch_and_signature_files() -> None:
    files = ("busybox_1.37.0.orig.tar.bz2.asc", "busybox_1.37.0.orig-extra.tar.gz", "busybox_1.37.0.orig.tar.bz2")
    (found,) = sources(source("busybox", "1:1.37.0-6", *files)).sources("busybox", "1.37")
    assert (found.version, found.upstream, found.pool_path) == (
        "1:1.37.0-6",
        "1.37.0",
        f"pool/main/b/busybox/{files[2]}",
    )


def test_sources_that_are_not_there() -> None:
    index = sources(
        source("linux", "6.12.9-1", "linux_6.12.9.orig.tar.xz"), source("native", "3.1", "native_3.1.tar.xz")
    )
    with pytest.raises(UsageError, match="no source package linus") as caught:
        index.sources("linus", "6.12")
    assert "linux" in (caught.value.hint or "")
    with pytest.raises(UsageError, match=r"no version in the series 6\.13") as caught:
        index.sources("linux", "6.13")
    assert "6.12.9-1" in (caught.value.reason or "")
    with pytest.raises(UsageError, match=r"no version in the series 6\.1\n"):
        index.sources("linux", "6.1")
    with pytest.raises(UsageError, match="no upstream tarball"):
        index.sources("native", "3")
