"""`docs/host-contract.md`, shares and places: what is where in a guest that a host boots with its shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests import needs_qemu
from tests.hosts import Hardware, Host, bundles, playing
from vzrepro.guest.vm.boot import HostPrograms

pytestmark = needs_qemu


def hardware(bundle: Path, **more: object) -> Hardware:
    return Hardware(bundle / "vmlinux", bundle / "initramfs.img", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of the host, each with a file `here` that has its name."""
    place = tmp_path_factory.mktemp("shares")
    for name in ("one", "two", "commits"):
        (place / name).mkdir()
        (place / name / "here").write_text(f"{name}\n")
    return place


@pytest.fixture(scope="module")
def stack(
    bundle: Path, programs: HostPrograms, busybox: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A guest for a stack: its `rootfs` has nothing in it yet."""
    shares = {"vz-mount-0": folders / "one", "vz-mount-1": folders / "two", "vz-setup-commits": folders / "commits"}
    machine = hardware(bundle, shares=shares, targets=("/work/one",))
    share = tmp_path_factory.mktemp("stack")
    with playing(bundle, programs, busybox, share=share, hardware=machine) as host:
        yield host


@pytest.fixture(scope="module")
def alone(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A guest for one container, whose root file system its `rootfs` is; that has a `grep` and a resolv.conf of its
    own, and no other program."""
    root = tmp_path_factory.mktemp("alone")
    for name, text in (("bin/grep", "#!/bin/sh\necho the image\\'s own grep\n"), ("etc/resolv.conf", "search image\n")):
        (root / name).parent.mkdir()
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    (root / "run").mkdir()
    (root / "run/of-the-image").touch()
    with playing(bundle, programs, busybox, share=root, stacked=False, hardware=hardware(bundle)) as host:
        yield host


def test_rootfs_is_the_lower_layer_of_the_agents_root(alone: Host) -> None:
    assert alone.main.shell("cat /etc/resolv.conf; ls /run/of-the-image") == "search image\n/run/of-the-image\n"
    alone.main.shell("echo changed > /etc/resolv.conf; rm /run/of-the-image")
    assert (alone.share / "etc/resolv.conf").read_text() == "search image\n"
    assert (alone.share / "run/of-the-image").exists()
    mounts = alone.main.shell("cat /proc/mounts").splitlines()
    assert [line.split()[2] for line in mounts if line.split()[1] == "/"][-1] == "overlay"


def test_the_rootfs_share_itself_is_writable_at_vz_rootfs(stack: Host) -> None:
    stack.main.shell("echo by the guest > /vz-rootfs/new")
    assert (stack.share / "new").read_text() == "by the guest\n"
    # Written by the host after boot.
    bundles.write_bundle(stack.share / "c1/run/vz-oci/bundles/c1", "c1", command=["true"])
    listed = stack.main.shell("ls /vz-rootfs/c1/run/vz-oci/bundles/c1; cat /vz-rootfs/c1/run/vz-oci/bundles/c1/*")
    assert listed.startswith("config.json\n{")


def test_a_lone_containers_bundle_written_after_boot_is_below_run(alone: Host) -> None:
    assert alone.bundle("c1") == "/run/vz-oci/bundles/c1"
    bundles.write_bundle(alone.share / "run/vz-oci/bundles/c1", "c1", command=["true"])
    assert alone.main.shell("ls /run/vz-oci/bundles/c1") == "config.json\n"


def test_a_lone_containers_bundle_written_before_boot_is_below_run(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path: Path
) -> None:
    bundles.write_bundle(tmp_path / "run/vz-oci/bundles/c1", "c1", command=["true"])
    with playing(bundle, programs, busybox, share=tmp_path, stacked=False, hardware=hardware(bundle)) as host:
        assert host.main.shell("ls /run/vz-oci/bundles/c1; ls /run/vz-oci/bin") == "config.json\nyouki\n"


def test_youki_is_executable_at_both_of_its_places(stack: Host, alone: Host) -> None:
    for host in (stack, alone):
        for path in ("/usr/local/bin/youki", "/run/vz-oci/bin/youki"):
            assert "youki" in host.main.text(path, "--version")


def test_a_volume_is_at_its_number_and_at_its_target(stack: Host, folders: Path) -> None:
    assert stack.main.shell("cat /mnt/vz-mount-0/here /work/one/here /mnt/vz-mount-1/here") == "one\none\ntwo\n"
    stack.main.shell("echo new > /work/one/new; echo new > /mnt/vz-mount-1/new")
    assert stack.main.shell("cat /mnt/vz-mount-0/new") == "new\n"
    assert (folders / "one/new").read_text() == (folders / "two/new").read_text() == "new\n"


@pytest.mark.parametrize("tag", ["vz-setup-commits"])
def test_other_shares_are_the_hosts_to_mount(stack: Host, tag: str) -> None:
    run = stack.main.run
    assert run("/bin/busybox", "mkdir", "-p", f"/{tag}").end == 0
    assert run("/bin/busybox", "mountpoint", "-q", f"/{tag}").end == 1
    assert run("/bin/busybox", "mount", "-t", "virtiofs", tag, f"/{tag}").end == 0
    assert run("/bin/busybox", "mountpoint", "-q", f"/{tag}").end == 0
    assert stack.main.shell(f"cat /{tag}/here") == "commits\n"


def test_without_rootfs_the_agent_runs_in_the_initramfs(bundle: Path, programs: HostPrograms, busybox: Path) -> None:
    with playing(bundle, programs, busybox, hardware=hardware(bundle)) as host:
        assert "/init\n" in host.main.shell("ls -d /init /vz-rootfs 2>/dev/null; :")
        assert "youki" in host.main.text("/run/vz-oci/bin/youki", "--version")
        assert "youki" in host.main.text("/usr/local/bin/youki", "--version")
        assert host.main.text("/bin/busybox", "awk", "BEGIN { print 6 * 7 }") == "42\n"


def test_busybox_is_in_bin_and_its_applets_have_names_unless_the_image_has_its_own(alone: Host, stack: Host) -> None:
    assert "BusyBox" in alone.main.text("/bin/busybox", "--help")
    for host in (alone, stack):
        assert host.main.text("/bin/sed", "-n", "s/root:x/found/p", "/etc/passwd").startswith("found")
        assert host.main.text("sed", "-n", "s/root:x/found/p", "/etc/passwd").startswith("found")
    assert alone.main.text("/bin/grep") == alone.main.text("grep") == "the image's own grep\n"
    assert sorted(path.name for path in (alone.share / "bin").iterdir()) == ["grep"], "the image was changed"


def test_the_file_systems_of_the_agents_root(stack: Host, alone: Host) -> None:
    wanted = {
        "/proc": "proc",
        "/sys": "sysfs",
        "/dev": "devtmpfs",
        "/dev/pts": "devpts",
        "/sys/fs/cgroup": "cgroup2",
        "/run/vz-oci/bin": "virtiofs",
    }
    for host in (stack, alone):
        lines = [line.split() for line in host.main.shell("cat /proc/mounts").splitlines()]
        mounts = {words[1]: words[2] for words in lines}
        assert {place: mounts.get(place) for place in wanted} == wanted
        host.main.shell("test -d /run/vz-oci && test -w /run/vz-oci && touch /tmp/x && test -c /dev/null")
        assert host.main.text("stat", "-c", "%a", "/tmp") == "1777\n"


def test_resolv_conf_is_there_when_the_image_has_none(stack: Host) -> None:
    stack.main.shell("until grep -q nameserver /etc/resolv.conf; do sleep 0.1; done")
    assert not (stack.share / "etc").exists()


def test_programs_and_scripts_at_their_places(stack: Host, alone: Host) -> None:
    for host in (stack, alone):
        host.main.shell("test -x /etc/udhcpc.script && test -x /sbin/udhcpc && test -x /usr/local/bin/vz-guest-agent")
        assert "revision 1" in host.main.text("/usr/local/bin/vz-guest-agent", "--version")


def test_a_read_only_rootfs_is_no_reason_not_to_run(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path: Path
) -> None:
    bundles.write_root(tmp_path, busybox)
    bundles.write_bundle(tmp_path / "run/vz-oci/bundles/c1", "c1", command=["sleep", "1000"])
    machine = hardware(bundle, read_only=("rootfs",))
    with playing(bundle, programs, busybox, share=tmp_path, stacked=False, hardware=machine) as host:
        assert "Read-only file system" in host.main.run("/bin/touch", "/vz-rootfs/new").text
        host.main.shell("touch /new")
        host.overlay("c1")
        host.main.oci_create("c1", host.bundle("c1"))
        host.main.oci_start("c1")
        pid = host.main.oci_state("c1").pid
        assert host.inside(pid, "echo inside") == "inside\n"
        host.main.oci_delete("c1", force=True)
