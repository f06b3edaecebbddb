"""From the real trixie to a running container: resolve, download, write, `docker load`, run. Network and Docker."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests import trixie
from vzrepro.sources.image import ImageId, image_tag

DOCKER = os.environ.get("VZREPRO_DOCKER", "docker")


def docker(*args: str) -> str:
    done = subprocess.run([DOCKER, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ImageId:
    """The image, loaded. It stays: another process may be using the very same one."""
    identity, archive = trixie.tiny_image(tmp_path_factory.mktemp("image"))
    docker("load", "-q", "-i", str(archive))
    return identity


def run(image: str, script: str) -> str:
    sandbox = ("--network", "none", "--read-only", "--user", "1000", "--tmpfs", "/tmp", "--cap-drop", "ALL")
    return docker("run", "--rm", *sandbox, image, "sh", "-c", script)


def test_it_runs_by_id_and_by_name(loaded: ImageId) -> None:
    for name in (str(loaded), image_tag(loaded)):
        out = run(name, "id; ls /; touch /tmp/x && ls -ld /tmp /bin")
        assert "uid=1000(builder) gid=1000(builder)" in out
        assert {"bin", "build", "etc", "in", "lib", "out", "tmp", "usr"} <= set(out.split())
        assert "/bin -> usr/bin" in out
    assert run(str(loaded), "echo 'a b' | sed s/b/c/; getconf PAGESIZE; locale -a").split()[:3] == ["a", "c", "4096"]


def test_docker_gives_it_the_id_that_was_computed(loaded: ImageId) -> None:
    (found,) = json.loads(docker("image", "inspect", str(loaded)))
    assert found["Id"] == str(loaded)
    assert found["RepoTags"] == [image_tag(loaded)]
    assert (found["Os"], found["Architecture"]) == ("linux", "amd64")


def test_nothing_in_it_is_setuid_or_unreadable(loaded: ImageId) -> None:
    """`find` is not in the image; coreutils' own recursion does: what cannot be read makes `ls` fail."""
    out = run(str(loaded), "ls -lR /usr /etc")
    assert not [line for line in out.splitlines() if line[:1] == "-" and ("s" in line[:10] or line[7] != "r")]


def test_the_newest_kernel_of_a_series_is_found() -> None:
    found = trixie.index().sources("linux", "6.12")[0]
    assert found.upstream.startswith("6.12.")
    assert found.url.endswith(f"/main/l/linux/linux_{found.upstream}.orig.tar.xz")
    assert found.size > 100 << 20


def test_the_shipped_keyring_signs_all_three_suites() -> None:
    assert set(trixie.index().dates) == {"trixie", "trixie-updates", "trixie-security"}
