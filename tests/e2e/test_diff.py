"""`vzrepro diff` as a process, with the real diffoscope in its sandbox; and that nothing has that in its closure."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import PATIENCE_SECS
from tests.differing import Newc, newc, tar
from tests.e2e.conftest import PROJECT, Cli, containers
from vzrepro.proof.audit.inside import sections
from vzrepro.recipe import lock
from vzrepro.recipe.evaluate import evaluate

Finding = dict[str, Any]


@pytest.fixture(scope="module")
def cli(project: Cli) -> Cli:
    """The project's workspace, with the image made."""
    project.realize("image-diffoscope")
    return project


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "same").write_text("same\n")
    return tmp_path / "a", tmp_path / "b"


def explained(cli: Cli, sides: tuple[Path, Path], *words: str) -> tuple[list[Finding], list[str], Finding]:
    """The details, the causes and the whole answer of `diff --json`, which must say that the sides differ."""
    lines = cli.run("diff", *map(str, sides), "--json", *words, code=1).stdout.splitlines()
    [answer] = [document for document in map(json.loads, lines) if "event" not in document]
    assert answer["equal"] is False
    explanation = answer["explanation"]
    return explanation["details"], [each["cause"] for each in explanation["guesses"]], explanation


def flipped(data: bytes, section: str, at: int, with_: bytes) -> bytes:
    """An ELF file with other bytes in a section."""
    [found] = [each for each in sections(data) if each.name == section]
    changed = bytearray(data)
    changed[found.offset + at : found.offset + at + len(with_)] = with_
    assert changed != data
    return bytes(changed)


def test_an_elf_file_with_another_build_id_and_other_code(cli: Cli, sides: tuple[Path, Path]) -> None:
    program = Path("/bin/ls").resolve().read_bytes()
    other = flipped(program, ".note.gnu.build-id", 16, b"\x5a" * 20)
    for side, data in zip(sides, (program, flipped(other, ".text", 64, b"\xc3" * 16)), strict=True):
        (side / "tool").write_bytes(data)
    details, causes, explanation = explained(cli, sides)
    assert re.fullmatch(r"diffoscope \d+\S*", explanation["tool"])
    found = {tuple(each["member"]): each for each in details}
    assert {(".note.gnu.build-id",), (".text",)} <= found.keys()
    assert found[".note.gnu.build-id",]["kind"] == "ELF section"
    text = found[".text",]
    assert text["kind"] == "ELF section"
    assert (text["offset"], text["count"] <= 16) == (64, True)
    assert re.search(r"^\+.*\bret\b", text["excerpt"], re.MULTILINE), text["excerpt"]
    assert "build-id" in causes
    assert explanation["truncated"] is None


def test_code_for_arm_is_disassembled(cli: Cli, sides: tuple[Path, Path]) -> None:
    [agent] = cli.realize("guest-agent")
    program = (agent / "vz-guest-agent").read_bytes()
    for side, data in zip(sides, (program, flipped(program, ".text", 4096, b"\xc0\x03\x5f\xd6")), strict=True):
        (side / "tool").write_bytes(data)
    details, _, _ = explained(cli, sides)
    [text] = [each for each in details if each["member"] == [".text"]]
    assert re.search(r"^\+.*\bret\b", text["excerpt"], re.MULTILINE), text["excerpt"]
    assert text["offset"] == 4096


def test_paths_in_programs_and_in_what_they_lie_in(cli: Cli, sides: tuple[Path, Path]) -> None:
    program = Path("/bin/ls").resolve().read_bytes()
    for side, text in zip(sides, (b"/build/one/main.c\0", b"/build/two/main.c\0"), strict=True):
        inner = tar({"bin/tool": flipped(program, ".rodata", 256, text)}, mtime=1)
        (side / "initramfs.img").write_bytes(gzip.compress(newc(Newc("payload.tar", inner)), mtime=0))
    details, causes, _ = explained(cli, sides)
    assert causes[0] == "path"
    assert any(each["member"][-2:] == ["bin/tool", ".rodata"] for each in details)


def test_times_in_archives_and_headers(cli: Cli, sides: tuple[Path, Path]) -> None:
    for side, moment in zip(sides, (1700000000, 1700000777), strict=True):
        (side / "initramfs.img").write_bytes(newc(Newc("init", b"#!/bin/sh\n", mtime=moment)))
        (side / "doc.gz").write_bytes(gzip.compress(b"text\n" * 100, mtime=moment))
    details, causes, _ = explained(cli, sides)
    assert causes == ["timestamp"]
    assert {(each["file"], *each["member"]) for each in details} == {
        ("initramfs.img", "init"),
        ("doc.gz", "gzip header"),
    }


def test_order_options_permissions_and_what_only_one_has(cli: Cli, sides: tuple[Path, Path]) -> None:
    for side, lines, hz in zip(sides, ("b\na\nc\n", "c\na\nb\n"), (100, 250), strict=True):
        (side / "lines").write_text(lines)
        (side / ".config").write_text(f"CONFIG_A=y\nCONFIG_HZ={hz}\n")
        (side / "script").write_text("#!/bin/sh\n")
    (sides[1] / "script").chmod(0o755)
    (sides[0] / "extra").mkdir()
    details, causes, _ = explained(cli, sides)
    assert [(each["file"], each["member"], each["kind"]) for each in details] == [
        ("extra", [], "listing"),
        (".config", ["CONFIG_HZ"], "text line"),
        ("lines", [], "text line"),
        ("script", [], "metadata"),
    ]
    assert set(causes) == {"order", "umask"}


def test_names_of_every_kind(cli: Cli, sides: tuple[Path, Path]) -> None:
    for side, text in zip(sides, ("one\n", "two\n"), strict=True):
        for name in (b"new\nline", b"\xff\xfe", b"--help", b"-", b"a b'c\"$(touch x)", "größe".encode(), b"x" * 255):
            Path(os.fsdecode(os.fsencode(side) + b"/" + name)).write_text(text)
        (side / "closed").write_text(text)
        (side / "closed").chmod(0o600)
    details, _, explanation = explained(cli, sides)
    assert [each["file"] for each in details] == [
        "-",
        "--help",
        "a b'c\"$(touch x)",
        "closed",
        "größe",
        "new\\nline",
        "x" * 255,
        "\\xff\\xfe",
    ]
    assert all("-one" in each["excerpt"] and "+two" in each["excerpt"] for each in details)
    assert explanation["truncated"] is None
    assert (sides[0] / "closed").stat().st_mode & 0o777 == 0o600


def test_what_is_cut_off_is_still_told_of(cli: Cli, sides: tuple[Path, Path]) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        info = tarfile.TarInfo("f")
        info.size = 100_000
        archive.addfile(info, io.BytesIO(os.urandom(100_000)))
    (sides[0] / "t.tar.gz").write_bytes(whole.getvalue())
    (sides[1] / "t.tar.gz").write_bytes(whole.getvalue()[:50_000])
    (sides[0] / "elf").write_bytes(Path("/bin/ls").resolve().read_bytes())
    (sides[1] / "elf").write_bytes(Path("/bin/ls").resolve().read_bytes()[:70_000])
    details, _, _ = explained(cli, sides)
    assert {each["file"] for each in details} == {"t.tar.gz", "elf"}


def test_the_time_limit_leaves_what_was_found_and_our_own_comparison(cli: Cli, sides: tuple[Path, Path]) -> None:
    # Some hundred million bytes that have to be dumped and aligned: not done in seconds, wherever this runs.
    for side, step in zip(sides, (1, 3), strict=True):
        rows = b"".join(b"%d\0\n" % (number * step % 999_983) for number in range(2_000_000))
        (side / "huge").write_bytes(rows * 5)
        (side / "small").write_text(f"step {step}\n")
    details, _, explanation = explained(cli, sides, "--limit-seconds", "10")
    assert "diffoscope has nothing on huge: " in explanation["truncated"]
    assert explanation["tool"].startswith("diffoscope")
    found = {each["file"]: each for each in details}
    assert found["small"]["excerpt"] == "@@ -1 +1 @@\n-step 1\n+step 3"
    assert found["huge"]["count"] > 1_000_000
    assert not remains(cli)


def test_the_memory_limit_leaves_our_own_comparison(cli: Cli, sides: tuple[Path, Path]) -> None:
    for side, seed in zip(sides, (b"a", b"b"), strict=True):
        (side / "bomb.gz").write_bytes(gzip.compress(seed + bytes(300 << 20), 1, mtime=0))
        (side / "small").write_bytes(seed + b"\n")
    details, _, explanation = explained(cli, sides, "--limit-memory", "96", "--limit-seconds", "60")
    assert "bomb.gz" in explanation["truncated"]
    assert {each["file"] for each in details} == {"bomb.gz", "small"}


def comparing(cli: Cli) -> list[str]:
    """The containers of comparisons in this store; other tests', of audits, have stores of their own."""
    return containers(cli, "label=vzrepro.target=the comparison")


def remains(cli: Cli) -> list[str]:
    """Containers of comparisons and what they left in the store."""
    return comparing(cli) + [str(each) for each in (cli.store / ".vzrepro").glob("*/*diff-*")]


def test_ctrl_c_leaves_nothing_behind(cli: Cli, sides: tuple[Path, Path]) -> None:
    for side, step in zip(sides, (1, 3), strict=True):
        (side / "huge").write_bytes(b"".join(b"%d\0\n" % (number * step % 999_983) for number in range(999_983)) * 12)
    process = cli.start("diff", *map(str, sides))
    while not comparing(cli):
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_SECS)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert out == ""
    assert not remains(cli)


def test_diffoscopes_own_page(cli: Cli, sides: tuple[Path, Path], tmp_path: Path) -> None:
    for side, text in zip(sides, ("<b>alpha</b>\n", "<i>bravo</i>\n"), strict=True):
        (side / "index").write_text(text)
        Path(os.fsdecode(os.fsencode(side) + b"/\xff")).write_text(text)
    (sides[0] / "only here").touch()
    page = tmp_path / "page.html"
    done = cli.run("diff", *map(str, sides), "--html", "--output", str(page), code=1)
    text = page.read_text()
    assert done.stdout.startswith(f"{sides[0]} and {sides[1]} differ in 3 places")
    assert "only here" in text
    assert "alpha" in text
    assert "<b>alpha" not in text
    # One file: nothing in it is fetched from anywhere.
    assert not re.search(r"""(?:src|xlink:href)\s*=\s*["'](?!data:)|@import|url\((?!["']?data:)""", text)
    assert not re.search(r"<(?:link|script)\b[^>]*(?:href|src)=[\"'](?!data:)", text)
    assert cli.run("diff", *map(str, sides), "--html", code=1).stdout.startswith("<!DOCTYPE html>")


def test_exit_codes_and_what_the_sides_may_be(cli: Cli, sides: tuple[Path, Path], tmp_path: Path) -> None:
    tool, other = cli.realize("guest-agent", "pinned")
    link = tmp_path / "link"
    link.symlink_to(tool)
    base = tool.name
    for name in ("guest-agent", base, f"store/{base}", str(tool), str(link)):
        assert cli.run("diff", "guest-agent", name).stdout == f"guest-agent and {name} are equal\n"
    assert cli.run("diff", "guest-agent", str(other), code=1).stdout.startswith("guest-agent and ")
    copy = tmp_path / "copy"
    shutil.copytree(tool, copy)
    quiet = replace(cli, env={"VZREPRO_DOCKER": "no-such-program"})
    same = quiet.run("diff", str(copy), "guest-agent", "--json")
    assert json.loads(same.stdout.splitlines()[-1]) == {"a": str(copy), "b": "guest-agent", "equal": True}
    for words in (
        ("no/such/file", "guest-agent"),
        ("no-such-target", "guest-agent"),
        ("guest-agent", "guest-agent", "--output", "x"),
    ):
        assert cli.run("diff", *words, code=2).stdout == ""
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "leads nowhere" in cli.run("diff", str(tmp_path / "dangling"), "guest-agent", code=2).stderr


def test_without_docker_the_bytes_are_compared(cli: Cli, sides: tuple[Path, Path]) -> None:
    for side, text in zip(sides, ("2026-01-01\n", "2026-01-02\n"), strict=True):
        (side / "day").write_text(text)
    without = replace(cli, env={"VZREPRO_DOCKER": "no-such-program"})
    details, causes, explanation = explained(without, sides)
    assert (explanation["tool"], len(details), causes) == ("bytes", 1, ["timestamp"])
    assert "no Docker client was found" in explanation["truncated"]
    done = without.run("diff", *map(str, sides), code=1)
    assert "warning: diffoscope could not be used" in done.stderr
    assert "there is no page" in without.run("diff", *map(str, sides), "--html", code=2).stderr
    # Asked for it that way, nothing is missing.
    _, _, explanation = explained(without, sides, "--bytes")
    assert explanation["truncated"] is None


def test_outside_of_a_workspace(sides: tuple[Path, Path], tmp_path: Path) -> None:
    nowhere = Cli(tmp_path, tmp_path / "store", {"HOME": str(tmp_path)})
    (sides[1] / "same").write_text("other\n")
    done = nowhere.run("diff", *map(str, sides), code=1)
    assert "same (text line" in done.stdout
    assert "without diffoscope" in done.stderr
    assert nowhere.run("diff", str(sides[0]), "guest-agent", code=2).stderr.startswith(
        "error: guest-agent: no such file"
    )


def test_nothing_we_ship_has_diffoscope_in_its_closure() -> None:
    graph = evaluate(PROJECT, lock.load(PROJECT / "lock.toml"), "linux/amd64")
    image = graph.find("image-diffoscope")
    assert image.kind == "image"
    users = [
        node.target
        for node in graph.nodes.values()
        if node is not image and image.drv_hash in {each.drv_hash for each in graph.closure([node])}
    ]
    assert users == []
