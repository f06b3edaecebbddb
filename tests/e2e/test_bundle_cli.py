"""`vzrepro bundle …` as a process: the contract of `ensure --json`, exit codes, the real bundle through all verbs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import make_bundle
from tests.e2e.conftest import Cli
from vzrepro.guest.metadata import KernelProfile

FOUR = ["initramfs.img", "version.json", "vmlinux", "youki"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """No workspace, an empty home, no bundle anywhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    none = {f"VZ_LINUX_{name}BUNDLE_DIR": "" for name in ("", "DEVELOPER_", "CONTAINER_")}
    return Cli(tmp_path / "here", tmp_path / "store", {"HOME": str(tmp_path / "home"), **none})


def answer(cli: Cli, *words: str) -> dict[str, Any]:
    """The one line of stdout that is no event."""
    lines = [json.loads(line) for line in cli.run(*words, "--json").stdout.splitlines()]
    [found] = [line for line in lines if "event" not in line]
    return found


def test_ensure_json_is_the_documented_contract(cli: Cli, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "container")
    words = ("bundle", "ensure", "--kernel-profile", "container")
    first = answer(cli, *words, "--require", "nfsd", "--bundle-dir", "../b")
    home = tmp_path / "home/.vz/linux/container"
    assert first == {
        "profile": "container",
        "directory": str(home),
        "kernel": str(home / "vmlinux"),
        "initramfs": str(home / "initramfs.img"),
        "youki": str(home / "youki"),
        "version_file": str(home / "version.json"),
        "version": json.loads((tmp_path / "b/version.json").read_text()),
        "source": "argument",
        "changed": True,
        "healed": False,
    }
    assert answer(cli, *words) == {**first, "source": "installed", "changed": False}
    (home / "vmlinux").unlink()
    healed = answer(cli, *words, "--bundle-dir", str(tmp_path / "b"))
    assert healed == {**first, "healed": True}
    assert cli.run(*words).stdout == f"{home}\n"
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text()
    table = page.partition("## `vzrepro bundle ensure --json`")[2].partition("| exit code")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert named == list(first)


def test_the_environment_and_the_workspace(cli: Cli, tmp_path: Path) -> None:
    make_bundle(cli.root / "linux/out/container", "container")
    make_bundle(tmp_path / "env", "container", kernel="7")
    words = ("bundle", "ensure", "--kernel-profile", "container")
    assert answer(cli, *words)["source"] == "workspace"
    named = Cli(cli.root, cli.store, {**cli.env, "VZ_LINUX_CONTAINER_BUNDLE_DIR": str(tmp_path / "env")})
    found = answer(named, *words)
    assert (found["source"], found["version"]["kernel"], found["changed"]) == ("env", "7", True)
    elsewhere = Cli(tmp_path, cli.store, cli.env)
    assert answer(elsewhere, "-C", str(cli.root), *words)["source"] == "workspace"


def test_hosts_that_refuse_it_are_told_of_and_what_to_type(cli: Cli, tmp_path: Path) -> None:
    declared = sorted([*KernelProfile.CONTAINER.default_capabilities, "dm_crypt", "snapshot_safe"])
    place = str(make_bundle(tmp_path / "b", "container", capabilities=declared))
    words = ("--kernel-profile", "container", "--bundle-dir", place)
    told = cli.run("bundle", "install", *words).stderr
    [line] = [line for line in told.splitlines() if "0.3.15" in line]
    assert "refuse this bundle, since they do not know dm_crypt, snapshot_safe; for them: " in line
    command = line.partition("for them: ")[2].split()
    assert command == "vzrepro bundle install --kernel-profile container --host-version 0.3.15".split()
    assert "0.3.15" not in cli.run(*command[1:], "--bundle-dir", place).stderr
    version = json.loads((tmp_path / "home/.vz/linux/container/version.json").read_text())
    assert version["capabilities"] == sorted(KernelProfile.CONTAINER.default_capabilities)
    found = answer(cli, "bundle", "ensure", "--kernel-profile", "container", "--host-version", "v0.3.15")
    assert (found["version"], found["changed"]) == (version, False)
    told = cli.run("bundle", "ensure", "--kernel-profile", "container", "--host-version", "0.4").stderr
    assert "nothing is known of hosts after 0.3.15: 0.4 is given what that one knows" in " ".join(told.split())
    for verb in ("install", "ensure"):
        assert "0.3.14" in cli.run("bundle", verb, *words, "--host-version", "0.3.14", code=2).stderr

    export = ("bundle", "export", place, "--version", "1", "--out")
    told = cli.run(*export, str(tmp_path / "whole")).stderr
    assert f"vzrepro bundle export {place} --version 1 --out DIR --host-version 0.3.15" in " ".join(told.split())
    cli.run(*export, str(tmp_path / "out"), "--host-version", "0.3.14", code=2)
    told = cli.run(*export, str(tmp_path / "out"), "--host-version", "0.3.15").stderr
    assert "no attestations lie beside" in told
    with tarfile.open(tmp_path / "out/vz-linux-container-v1-arm64.tar.gz") as archive:
        file = archive.extractfile("version.json")
        assert file is not None
        assert json.load(file) == version


def test_the_developer_bundle_is_in_both_places(cli: Cli, tmp_path: Path) -> None:
    make_bundle(tmp_path / "d")
    make_bundle(tmp_path / "c", "container")
    linux = tmp_path / "home/.vz/linux"
    cli.run("bundle", "install", "--kernel-profile", "container", "--bundle-dir", str(tmp_path / "c"))
    first = answer(cli, "bundle", "install", "--bundle-dir", str(tmp_path / "d"))
    assert (first["directory"], first["changed"]) == (str(linux / "developer"), True)
    assert sorted(path.name for path in linux.iterdir()) == sorted(["container", "developer", *FOUR])
    for name in FOUR:
        assert (linux / name).read_bytes() == (linux / "developer" / name).read_bytes()
    cli.run("bundle", "verify")
    # As a host without profiles, and as a user who names the directory.
    found = answer(cli, "bundle", "ensure", "--install-dir", str(linux))
    assert (found["directory"], found["profile"], found["changed"]) == (str(linux), "developer", False)


Break = Callable[[Path], object]


@pytest.mark.parametrize(
    ("name", "damage", "code", "told"),
    [
        ("truncated", lambda place: (place / "vmlinux").write_bytes(b"half"), 102, "vmlinux is damaged or another one"),
        (
            "swapped",
            lambda place: shutil.copy(place / "youki", place / "initramfs.img"),
            102,
            "initramfs.img is damaged",
        ),
        ("missing", lambda place: (place / "youki").unlink(), 2, "it lacks youki"),
        (
            "checksum",
            lambda place: make_bundle(place, "container", sha256_youki="none"),
            102,
            "youki is damaged or another one",
        ),
        ("no json", lambda place: (place / "version.json").write_text("{"), 2, "version.json is not JSON"),
        ("no keys", lambda place: (place / "version.json").write_text("{}"), 2, "version.json lacks kernel, busybox"),
        ("profile", lambda place: make_bundle(place, "developer"), 1, "wanted: container; found: developer"),
        ("agent", lambda place: make_bundle(place, "container", agent="0.0.1"), 1, "has another guest agent"),
        ("revision", lambda place: make_bundle(place, "container", agent_protocol_revision=9), 1, "another revision"),
        ("capability", lambda place: make_bundle(place, "container", capabilities=["vsock"]), 1, "does not declare"),
    ],
)
def test_what_is_wrong_with_a_bundle(cli: Cli, tmp_path: Path, name: str, damage: Break, code: int, told: str) -> None:
    """Each is one clear error with a command to copy, be it to be installed or installed already."""
    place = make_bundle(tmp_path / "b", "container", unknown="key")
    words = ("--kernel-profile", "container", "--bundle-dir", str(place))
    cli.run("bundle", "ensure", *words)
    damage(place)
    done = cli.run("bundle", "ensure", *words, code=code)
    assert done.stdout == ""
    assert told in done.stderr
    assert "hint: " in done.stderr
    assert "vzrepro " in done.stderr.partition("hint: ")[2]
    assert "Traceback" not in done.stderr
    cli.run("bundle", "verify", *words, code=code)
    event = json.loads(cli.run("bundle", "ensure", *words, "--json", code=code).stdout.splitlines()[-1])
    assert (event["event"], event["exit_code"]) == ("error", code)
    # What was installed before is still there, and whole; broken itself, it is the same error.
    cli.run("bundle", "verify", "--kernel-profile", "container")
    installed = tmp_path / "home/.vz/linux/container"
    for path in installed.iterdir():
        path.chmod(0o644)
    damage(installed)
    assert told in cli.run("bundle", "ensure", "--kernel-profile", "container", code=code).stderr


def test_usage(cli: Cli, tmp_path: Path) -> None:
    assert "there is no developer bundle" in cli.run("bundle", "ensure", code=1).stderr
    assert "is not a boot bundle" in cli.run("bundle", "ensure", "--bundle-dir", str(tmp_path), code=2).stderr
    cli.run("bundle", "ensure", "--kernel-profile", "desktop", code=2)
    assert "there is no developer bundle" in cli.run("bundle", "install", code=1).stderr
    assert "no workspace" in cli.run("bundle", "ensure", "--realize", code=2).stderr
    assert "no bundles" in cli.run("bundle", "list").stdout
    old = make_bundle(tmp_path / "old", agent="0.0.1")
    cli.run("bundle", "ensure", "--bundle-dir", str(old), code=1)
    cli.run("bundle", "ensure", "--bundle-dir", str(old), "--any-agent")


def test_list_and_verify_show_what_there_is(cli: Cli, tmp_path: Path) -> None:
    home = tmp_path / "home/.vz/linux"
    make_bundle(home / "container", "container")
    assert "intact, container" in cli.run("bundle", "verify").stdout
    make_bundle(home / "developer", agent="0.0.1")
    make_bundle(home, capabilities=["vsock"], agent="0.0.2")
    (home / "vmlinux").write_bytes(b"damaged")
    rows = [json.loads(line) for line in cli.run("bundle", "list", "--json").stdout.splitlines()]
    assert [(row["profile"], row["source"], row["state"], row["directory"]) for row in rows] == [
        ("developer", "installed", "unfit", str(home / "developer")),
        ("developer", "installed", "damaged", str(home)),
        ("container", "installed", "intact", str(home / "container")),
    ]
    assert "has another guest agent" in rows[0]["why"]
    assert str(home / "vmlinux") in rows[1]["why"]
    cli.run("bundle", "verify", code=1)


# --- the real one


def test_the_real_bundle_is_installed_ensured_and_verified(bundle: Path, project: Cli, tmp_path: Path) -> None:
    """`install` and `ensure --realize` make it from the workspace."""
    none = {f"VZ_LINUX_{name}BUNDLE_DIR": "" for name in ("", "DEVELOPER_", "CONTAINER_")}
    cli = Cli(project.root, project.store, none)
    target = tmp_path / "installed"
    words = ("--kernel-profile", "container", "--install-dir", str(target))
    assert cli.run("bundle", "install", *words).stdout == f"{target}\n"
    assert sorted(path.name for path in target.iterdir()) == FOUR
    for name in FOUR:
        assert (target / name).read_bytes() == (bundle / name).read_bytes()
    assert cli.run("bundle", "verify", *words).stdout.startswith(f"{target}: intact, container, Linux ")
    (target / "youki").chmod(0o755)
    (target / "youki").write_bytes(b"tampered")
    assert str(target / "youki") in cli.run("bundle", "ensure", *words, code=102).stderr
    healed = answer(cli, "bundle", "ensure", "--realize", *words)
    assert (healed["source"], healed["healed"]) == ("realized", True)
    assert answer(cli, "bundle", "ensure", "--realize", *words)["source"] == "installed"


def test_the_real_bundle_is_exported(bundle: Path, project: Cli, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "vz-linux-container-v0.1.0-arm64.tar.gz"
    words = ("bundle", "export", "container-bundle", "--version", "0.1.0", "--out", str(out))
    row = json.loads(project.run(*words, "--json").stdout.splitlines()[-1])
    assert (row["archive"], row["state"]) == (str(out / name), "written")
    assert row["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    beside = {path.name for path in out.iterdir()} - {name, f"{name}.sha256"}
    assert beside <= {name.replace(".tar.gz", ".intoto.jsonl")}  # as far as anybody has signed
    subprocess.run(["sha256sum", "-c", "--quiet", f"{name}.sha256"], cwd=out, check=True)
    assert "present" in project.run(*words).stdout
    # As an installer does it.
    with tarfile.open(out / name) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    project.run("bundle", "verify", "--kernel-profile", "container", "--bundle-dir", str(tmp_path / "unpacked"))
    # The directory gives the same bytes as the target.
    project.run("bundle", "export", f"{bundle}/", "--version", "0.1.0", "--out", str(tmp_path / "again"))
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    (out / name).write_bytes(b"published")
    assert "is there already" in project.run(*words, code=2).stderr
