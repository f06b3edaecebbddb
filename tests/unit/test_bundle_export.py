"""The archives: which there are, what is in them, that they are the same bytes every time, that none is overwritten."""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.bundles import CONTENT, make_bundle, names
from vzrepro.base.errors import HashMismatch, UsageError, VzreproError
from vzrepro.cache import SigningKey
from vzrepro.guest.bundle import examine, export
from vzrepro.guest.bundle.export import write_tar
from vzrepro.guest.bundle.files import FILES
from vzrepro.proof.attest.dsse import sign
from vzrepro.proof.attest.statement import Statement, Subject, files_named

TAR_SHA256 = "4211464e2fa7943971a9f48ee9f9cc6029260daae650a59f07ea1b19956969f4"
"""Of the tar layer of the bundle below. Another one is another format: published archives could not be made again."""


def test_the_tar_layer_is_a_format(tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "b", "container", agent="0.1.0", capabilities=["vsock"])
    sink = io.BytesIO()
    write_tar(examine(place), sink)
    assert hashlib.sha256(sink.getvalue()).hexdigest() == TAR_SHA256


def test_four_files_at_the_top(tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "b", "container", built="2025-02-03T04:05:06Z")
    [made] = export(place, "1.2.0", tmp_path / "out")
    assert made.path == tmp_path / "out/vz-linux-container-v1.2.0-arm64.tar.gz"
    assert made.written
    assert (made.size, made.sha256) == (
        made.path.stat().st_size,
        hashlib.sha256(made.path.read_bytes()).hexdigest(),
    )
    with tarfile.open(made.path) as archive:
        entries = archive.getmembers()
        assert [entry.name for entry in entries] == ["vmlinux", "initramfs.img", "youki", "version.json"]
        assert [entry.mode for entry in entries] == [0o644, 0o644, 0o755, 0o644]
        assert {(entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime) for entry in entries} == {
            (0, 0, "", "", 1738555506)
        }
        for entry in entries:
            file = archive.extractfile(entry)
            assert file is not None
            assert file.read() == (place / entry.name).read_bytes()
    assert names(tmp_path / "out") == [made.path.name, f"{made.path.name}.sha256"]
    check = ["sha256sum", "-c", "--strict", f"{made.path.name}.sha256"]
    assert subprocess.run(check, cwd=tmp_path / "out", capture_output=True, check=False).returncode == 0


def test_the_header_has_neither_name_nor_time(tmp_path: Path) -> None:
    [made] = export(make_bundle(tmp_path / "b", "container"), "1", tmp_path / "out")
    # RFC 1952: magic, deflate, no flags, time 0, slowest compression, unknown system.
    assert made.path.read_bytes()[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"


def test_both_profiles_and_the_historical_name(tmp_path: Path) -> None:
    both = tmp_path / "bundles"
    for profile in ("developer", "container"):
        make_bundle(both / profile, profile, content={"vmlinux": profile.encode()})
    made = {archive.path.name: archive for archive in export(both, "0.4.0-rc1", tmp_path / "out")}
    assert list(made) == [
        "vz-linux-container-v0.4.0-rc1-arm64.tar.gz",
        "vz-linux-developer-v0.4.0-rc1-arm64.tar.gz",
        "vz-linux-v0.4.0-rc1-arm64.tar.gz",
    ]
    assert names(tmp_path / "out") == sorted([*made, *(f"{name}.sha256" for name in made)])
    container, developer, historical = made.values()
    assert historical.path.read_bytes() == developer.path.read_bytes() != container.path.read_bytes()
    for name, archive in made.items():
        assert (tmp_path / "out" / f"{name}.sha256").read_text() == f"{archive.sha256}  {name}\n"


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    [one] = export(make_bundle(tmp_path / "one", "container"), "1", tmp_path / "out1")
    other = make_bundle(tmp_path / "two", "container")
    for path in other.iterdir():
        path.chmod(0o600)
    [two] = export(other, "1", tmp_path / "out2")
    assert one.path.read_bytes() == two.path.read_bytes()


def test_what_is_there_stays(tmp_path: Path) -> None:
    place, out = make_bundle(tmp_path / "b", "developer"), tmp_path / "out"
    assert [archive.written for archive in export(place, "1", out)] == [True, True]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert [archive.written for archive in export(place, "1", out)] == [False, False]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("taken", ["vz-linux-v1-arm64.tar.gz", "vz-linux-developer-v1-arm64.tar.gz.sha256"])
def test_another_archive_is_never_overwritten(tmp_path: Path, taken: str) -> None:
    place, out = make_bundle(tmp_path / "b", "developer"), tmp_path / "out"
    out.mkdir()
    (out / taken).write_text("published")
    with pytest.raises(UsageError, match=f"{taken} is there already, and is another one") as caught:
        export(place, "1", out)
    assert f"rm {out / taken}" in (caught.value.hint or "")
    assert names(out) == [taken]
    assert (out / taken).read_text() == "published"


@pytest.mark.parametrize("version", ["v1.2.0", "", "1/2", "../1", "1 2", "1.2.", "latest"])
def test_what_is_no_version(tmp_path: Path, version: str) -> None:
    with pytest.raises(UsageError, match="is not a version"):
        export(make_bundle(tmp_path / "b"), version, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_bundle_is_not_packed(tmp_path: Path) -> None:
    make_bundle(tmp_path / "both/container", "container")
    place = make_bundle(tmp_path / "both/developer")
    (place / "youki").write_bytes(CONTENT["youki"][:-1])
    with pytest.raises(HashMismatch, match="youki"):
        export(tmp_path / "both", "1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_changes_while_it_is_packed(tmp_path: Path) -> None:
    found = examine(make_bundle(tmp_path / "b"))
    (tmp_path / "b/vmlinux").write_bytes(CONTENT["vmlinux"].swapcase())
    with pytest.raises(HashMismatch, match="vmlinux"):
        write_tar(found, io.BytesIO())


def test_no_bundle_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty/child").mkdir(parents=True)
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="is not a boot bundle"):
            export(place, "1", tmp_path / "out", files_of=files_named)


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(VzreproError, match="cannot be written"):
        export(make_bundle(tmp_path / "b"), "1", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr("os.link", refuse)
    [made] = export(make_bundle(tmp_path / "b", "container"), "1", tmp_path / "out")
    assert made.written
    assert gzip.decompress(made.path.read_bytes())
    assert len(names(tmp_path / "out")) == 2
    assert [archive.written for archive in export(tmp_path / "b", "1", tmp_path / "out")] == [False]


# --- attestations -----------------------------------------------------------------------------------------------------

KEY = SigningKey.generate("ours-1")


def attestation(place: Path, key: SigningKey = KEY, **other: str) -> bytes:
    """A signed statement about the files of the bundle in `place`; `other` are digests that are to be different."""
    digests = {name.replace(".", "_"): digest for name, digest in examine(place).digests.items()} | other
    names = {name.replace(".", "_"): name for name in FILES}
    return Statement(
        tuple(Subject(names.get(name, name), {"sha256": digest}) for name, digest in digests.items()), "t", {"a": 1}
    ).signed(key)


def test_attestations_of_these_very_files_lie_beside_the_archive(tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "b", "container")
    good = [attestation(place), attestation(place, SigningKey.generate("other-1"), extra="ab" * 32)]
    others = [
        attestation(make_bundle(tmp_path / "c", "container", content={"youki": b"another"})),
        attestation(place, youki="00" * 32),
        Statement((Subject("youki", {"sha256": examine(place).digests["youki"]}),), "t", {"a": 1}).signed(KEY),
        sign("text/plain", b"hello", KEY),
        b"junk",
        good[0] + b"\n",
    ]
    [made] = export(place, "1", tmp_path / "out", [*others, *good], files_of=files_named)
    assert made.attestations == 2
    beside = tmp_path / "out/vz-linux-container-v1-arm64.intoto.jsonl"
    assert beside.read_bytes() == b"".join(line + b"\n" for line in sorted(good))
    assert stat.S_IMODE(beside.stat().st_mode) == 0o644
    assert len(names(tmp_path / "out")) == 3


def test_attestations_become_more_and_archives_stay(tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "b", "developer")
    first, second = attestation(place), attestation(place, SigningKey.generate("other-1"))
    assert [each.attestations for each in export(place, "1", tmp_path / "out")] == [0, 0]
    assert not list((tmp_path / "out").glob("*.jsonl"))
    archives = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    export(place, "1", tmp_path / "out", [first], files_of=files_named)
    again = export(place, "1", tmp_path / "out", [second], files_of=files_named)
    assert [(each.written, each.attestations) for each in again] == [(False, 2)] * 2
    assert {path: path.read_bytes() for path in archives} == archives
    both = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.jsonl"))]
    assert both == [b"".join(line + b"\n" for line in sorted([first, second]))] * 2, "the historical name has them too"
    export(place, "1", tmp_path / "out", files_of=files_named)
    assert [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.jsonl"))] == both, "none is taken away"


def test_what_is_no_file_of_attestations_is_refused(tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "b", "container")
    beside = tmp_path / "out/vz-linux-container-v1-arm64.intoto.jsonl"
    beside.mkdir(parents=True)
    with pytest.raises(UsageError, match="no file of attestations"):
        export(place, "1", tmp_path / "out", [attestation(place)], files_of=files_named)
    assert names(tmp_path / "out") == [beside.name], "nothing else was written"
