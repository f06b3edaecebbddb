"""Whose workspaces are used: what somebody else made, or can write to, is refused until the user trusts it."""

from __future__ import annotations

import grp
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bundles import DEVELOPER, find, make_bundle, make_surroundings
from tests.crashing import ended, forked
from vzrepro.base import config, trust
from vzrepro.base.config import find_workspace, load
from vzrepro.base.errors import Untrusted, UsageError, VzreproError
from vzrepro.guest import bundle as bundles
from vzrepro.guest.bundle import KernelBundleOptions
from vzrepro.guest.vm import places

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to others needs root")

STRANGER = 54321
RELIED_ON = [
    "",
    "recipes",
    "pyproject.toml",
    "lock.toml",
    "sbom.toml",
    "recipes/a/b",
    "recipes/a/b/data",
    "recipes/c.py",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace with everything in it that is relied on."""
    root = tmp_path / "workspace"
    (root / "recipes/a/b").mkdir(parents=True)
    for name in RELIED_ON:
        if not (root / name).exists():
            (root / name).touch()
    return root


def seek(root: Path, user: str = "", **environ: str) -> Path:
    """Find the workspace from below it, with this text as the user's configuration."""
    file = root.parent / "user.toml"
    file.write_text(user)
    return find_workspace(root / "recipes/a", environ, file)


# --- whose


def test_the_callers_own_is_used(root: Path) -> None:
    assert seek(root) == root
    (root / "recipes/a/loop").symlink_to("..")
    (root / "elsewhere").mkdir()
    os.chown(root / "elsewhere", STRANGER, STRANGER)
    assert seek(root) == root


@pytest.mark.parametrize("name", RELIED_ON)
def test_what_is_somebody_elses_is_refused(root: Path, name: str) -> None:
    os.chown(root / name, STRANGER, STRANGER)
    with pytest.raises(Untrusted, match=f"the workspace {root} is not trusted: ") as caught:
        seek(root)
    assert f"{root / name}: it belongs to uid {STRANGER}" in caught.value.message
    assert caught.value.exit_code == 103


@pytest.mark.parametrize("name", RELIED_ON)
@pytest.mark.parametrize("mode", [0o002, 0o020, 0o1002])
def test_what_others_can_write_to_is_refused(root: Path, name: str, mode: int) -> None:
    """A sticky bit helps nothing: it keeps what is there from being replaced, not something from being added."""
    os.chown(root / name, 0, STRANGER)
    (root / name).chmod((root / name).stat().st_mode | mode)
    with pytest.raises(Untrusted) as caught:
        seek(root)
    who = f"the group with gid {STRANGER}" if mode == 0o020 else "anybody"
    assert f"{root / name}: {who} may write to it" in caught.value.message
    assert (caught.value.hint or "").startswith(f"chmod g{'' if mode == 0o020 else 'o'}-w {root / name}\n")


def test_a_group_of_ones_own_is_nobody_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every user has one, and umask 002."""
    (root / "recipes").chmod(0o775)
    assert grp.getgrgid(0).gr_mem == []
    assert seek(root) == root
    entry = grp.getgrgid(0)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((entry.gr_name, "x", gid, ["mallory"])))
    with pytest.raises(Untrusted, match="the group root may write to it"):
        seek(root)


def test_links_count_with_what_they_lead_to(root: Path) -> None:
    target = root.parent / "lock.toml"
    target.touch()
    (root / "lock.toml").unlink()
    (root / "lock.toml").symlink_to(target)
    assert seek(root) == root
    os.chown(target, STRANGER, STRANGER)
    with pytest.raises(Untrusted, match=r"lock\.toml: it belongs to"):
        seek(root)
    os.chown(target, 0, 0)
    os.chown(root / "lock.toml", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(Untrusted, match=r"lock\.toml: it belongs to"):
        seek(root)


def test_the_caller_of_sudo_is_no_stranger(root: Path) -> None:
    for name in RELIED_ON:
        os.chown(root / name, STRANGER, STRANGER)
    assert seek(root, SUDO_UID=str(STRANGER)) == root
    for other in (str(STRANGER + 1), "", "x", "-1", "٣"):
        with pytest.raises(Untrusted):
            seek(root, SUDO_UID=other)


def test_others_than_root(root: Path) -> None:
    """Root's files are good for everybody; SUDO_UID is for root alone."""
    for folder in (root.parent, *root.parent.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o055)
    file = root.parent / "user.toml"

    def work() -> None:
        os.setuid(STRANGER)
        assert find_workspace(root, {}, file) == root
        assert trust.uids({"SUDO_UID": "77"}) == trust.uids({}) >= {0, STRANGER}

    assert ended(forked(work)) == 0
    (root / "recipes/a").chmod(0o700)  # which they cannot look into: it decides nothing for them
    assert ended(forked(work)) == 0
    os.chown(root / "recipes/c.py", STRANGER + 1, 0)

    def refused() -> None:
        os.setuid(STRANGER)
        with pytest.raises(Untrusted):
            find_workspace(root, {"SUDO_UID": str(STRANGER + 1)}, file)

    assert ended(forked(refused)) == 0


def test_who_owns_vzrepro_is_obeyed_already(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root in a container, with the user's checkout in it: whose code runs can do everything anyway."""
    package = root.parent / "vzrepro"
    package.mkdir()
    os.chown(package, STRANGER, STRANGER)
    os.chown(root, STRANGER, STRANGER)
    monkeypatch.setattr(trust, "__file__", str(package / "trust.py"))
    assert seek(root) == root


# --- trusting one


def test_the_line_of_the_error_is_what_it_takes(root: Path) -> None:
    os.chown(root, STRANGER, STRANGER)
    before = 'trusted-workspaces = ["/other"]'
    with pytest.raises(Untrusted) as caught:
        seek(root, before)
    [line] = [line for line in (caught.value.hint or "").splitlines() if line.startswith("trusted-workspaces")]
    assert tomllib.loads(line) == {"trusted-workspaces": ["/other", str(root)]}
    assert seek(root, line) == root
    assert f"VZREPRO_TRUSTED_WORKSPACES={root} vzrepro" in (caught.value.hint or "")
    assert seek(root, before, VZREPRO_TRUSTED_WORKSPACES=f"/another {root}") == root


@pytest.mark.parametrize(
    ("entry", "trusted"),
    [
        ("*", True),
        ("{root}", True),
        ("{root}/", True),
        ("{parent}/*", True),
        ("{parent}", False),
        ("{root}/*", False),
        ("{root}/recipes", False),
        ("{link}", True),
    ],
)
def test_what_is_trusted(root: Path, entry: str, trusted: bool) -> None:
    os.chown(root, STRANGER, STRANGER)
    (root.parent / "link").symlink_to(root)
    text = entry.format(root=root, parent=root.parent, link=root.parent / "link")
    if trusted:
        assert seek(root, f'trusted-workspaces = ["{text}"]') == root
        return
    with pytest.raises(Untrusted):
        seek(root, f'trusted-workspaces = ["{text}"]')


@pytest.mark.parametrize("entry", ["workspace", "./x", "", "**"])
def test_a_trusted_workspace_is_an_absolute_path(root: Path, entry: str) -> None:
    os.chown(root, STRANGER, STRANGER)
    with pytest.raises(UsageError, match=r"user\.toml: trusted-workspaces"):
        seek(root, f'trusted-workspaces = ["{entry}"]')


def test_no_workspace_trusts_itself(root: Path) -> None:
    (root / "pyproject.toml").write_text('[tool.vzrepro]\ntrusted-workspaces = ["*"]\n')
    with pytest.raises(UsageError, match=r"pyproject\.toml: trusted-workspaces: a workspace cannot say") as caught:
        load(root, {}, root.parent / "user.toml")
    assert str(config.USER_FILE) in (caught.value.hint or "")
    os.chown(root, STRANGER, STRANGER)
    with pytest.raises(Untrusted):
        seek(root)


def test_settings_of_a_directory_that_is_no_workspace(tmp_path: Path) -> None:
    """`verify` and others read them where they are called, be it in /tmp."""
    tmp_path.chmod(0o1777)
    assert load(tmp_path, {}, tmp_path / "none").jobs == 0
    (tmp_path / "pyproject.toml").write_text("[tool.vzrepro]\njobs = 3\n")
    assert load(tmp_path, {}, tmp_path / "none").jobs == 3
    os.chown(tmp_path / "pyproject.toml", STRANGER, STRANGER)
    with pytest.raises(Untrusted, match=r"pyproject\.toml: it belongs to"):
        load(tmp_path, {}, tmp_path / "none")
    assert load(tmp_path, {"VZREPRO_TRUSTED_WORKSPACES": str(tmp_path)}, tmp_path / "none").jobs == 3


# --- bundles


Change = Callable[[Path], object]


@pytest.mark.parametrize("name", ["", "linux", "linux/out", "linux/out/vmlinux", "linux/out/version.json", "recipes"])
@pytest.mark.parametrize("whose", ["stranger", "anybody"])
def test_no_bundle_is_taken_from_where_somebody_else_could_have_put_it(tmp_path: Path, name: str, whose: str) -> None:
    around = make_surroundings(tmp_path)
    root = around.start.parent
    make_bundle(root / "linux/out", kernel="evil")
    assert find(around, KernelBundleOptions(DEVELOPER, install_dir=None)).paths.version.kernel == "evil"
    make_bundle(tmp_path / "home/.vz/linux/developer", kernel="good")
    if whose == "stranger":
        os.chown(root / name, STRANGER, STRANGER)
    else:
        (root / name).chmod(0o1777)
    found = find(around, KernelBundleOptions(DEVELOPER))
    assert (found.source, found.paths.version.kernel) == ("installed", "good")
    [refused] = [place for place in bundles.places(KernelBundleOptions(), around) if place.source == "workspace"]
    assert refused.refused is not None
    for path in (tmp_path / "home/.vz/linux/developer", tmp_path / "home/.vz/linux"):
        for each in path.glob("*.*"):
            each.unlink()
        (path / "vmlinux").unlink()
        (path / "youki").unlink()
    with pytest.raises(VzreproError, match="there is no developer bundle") as caught:
        find(around, KernelBundleOptions(DEVELOPER))
    assert f"because the workspace {root} is not trusted: {root / name}" in (caught.value.reason or "")
    assert "trusted-workspaces = " in (caught.value.hint or "")
    around.user_file.write_text(f'trusted-workspaces = ["{root}"]')
    assert find(around, KernelBundleOptions(DEVELOPER)).paths.version.kernel == "evil"


# --- containers


@pytest.mark.parametrize(
    ("variable", "name", "place", "at_home"),
    [
        ("XDG_RUNTIME_DIR", "vz", places.containers, "run"),
        ("XDG_DATA_HOME", "vz/volumes", places.volumes, "volumes"),
    ],
)
def test_where_containers_and_volumes_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    name: str,
    place: Callable[[], Path],
    at_home: str,
) -> None:
    """A directory that su left in the environment is another user's: there is one at home."""
    directory, home = tmp_path / "directory", tmp_path / "home"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv(variable, str(directory))
    monkeypatch.setenv("HOME", str(home))
    assert place() == directory / name
    os.chown(directory, STRANGER, STRANGER)
    assert place() == home / ".vz" / at_home
    os.chown(directory, 0, 0)
    (directory / name).mkdir(parents=True)
    os.chown(directory / name, STRANGER, STRANGER)
    with pytest.raises(Untrusted, match=f"{directory / name} is not trusted: it belongs to") as caught:
        place()
    assert variable in (caught.value.hint or "")
