"""What tests of the whole need: the CLI in a workspace of its own, and objects that are realized once per session."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import PATIENCE_SECS, engines, trixie
from tests.commands import Commands
from tests.containers import Oci
from tests.e2e import sandboxes
from tests.guests import host_programs
from vzrepro import sandbox
from vzrepro.base import disk
from vzrepro.guest.vm.boot import HostPrograms
from vzrepro.sources.image import image_id

PROJECT = Path(__file__).resolve().parents[2]

SMALL = """
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, local, text

LOW = build("low", image=TOOLS_IMAGE, command=["sh", "/in/src/low.sh"], inputs={"src": local("low.sh")})
HIGH = build(
    "high",
    image=TOOLS_IMAGE,
    command=["sh", "/in/script"],
    inputs={
        "low": LOW,
        "script": text(
            "script", "sleep ${PAUSE-0}; cat /in/low/low > /out/high; date -u -d @$SOURCE_DATE_EPOCH >> /out/high"
        ),
    },
)
"""
LOW_SH = "echo low > /out/low; cat /out/low\n"


@dataclass
class Cli(Commands):
    """`vzrepro` run as a process in the workspace `root` with the store `store`."""

    TIMEOUT_SECS = 3000

    root: Path
    store: Path
    env: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VZREPRO_")}
        # Who runs the tests of a checkout trusts it, whatever its modes are.
        trusted = {"VZREPRO_TRUSTED_WORKSPACES": str(PROJECT)}
        return {**kept, **trusted, "VZREPRO_STORE": str(self.store), **self.env}

    def realize(self, *targets: str) -> list[Path]:
        return [Path(line) for line in self.run("realize", *targets).stdout.splitlines()]

    def write(self, **recipes: str) -> None:
        for name, source in recipes.items():
            folder = self.root / "recipes" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text(source)


@pytest.fixture(scope="session")
def project() -> Cli:
    """The project's own workspace and store, with the user's machine cache: what is built once stays built."""
    return Cli(PROJECT, PROJECT / "store")


@pytest.fixture(scope="session")
def bundle(project: Cli) -> Path:
    """The realized container-bundle, or that of the profile `VZREPRO_TEST_PROFILE`."""
    return project.realize(f"{os.environ.get('VZREPRO_TEST_PROFILE', 'container')}-bundle")[0]


@pytest.fixture(scope="session")
def busybox(project: Cli) -> Path:
    """The realized busybox: the program, and `applets`, its names."""
    return project.realize("busybox")[0]


@pytest.fixture(scope="session")
def bundle_of(project: Cli) -> Callable[[str], Path]:
    """The realized bundle of a profile. Tests of the developer profile want its kernel here or in a cache.

    It takes 25 to 90 minutes to build, more than all tests together.
    """

    def realized(profile: str) -> Path:
        target, kernel = f"{profile}-bundle", "kernel-developer"
        if profile == "developer":
            plan = project.run("realize", target, "--dry-run", "--json").stdout.splitlines()
            if any((step.get("action"), step.get("target")) == ("build", kernel) for step in map(json.loads, plan)):
                pytest.skip(f"{kernel} is neither here nor in a cache; to have these tests: ./run realize {target}")
        return project.realize(target)[0]

    return realized


@pytest.fixture(scope="session")
def programs(project: Cli) -> HostPrograms:
    """The realized programs that serve a guest's devices."""
    return host_programs(project.realize)


@pytest.fixture(scope="module")
def oci(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Oci:
    """`vzrepro oci` with places of its own."""
    return Oci(bundle, tmp_path_factory.mktemp("r"))


@pytest.fixture(scope="session")
def image() -> str:
    """An image with a shell, coreutils, busybox and nginx."""
    return str(trixie.service_image())


@pytest.fixture(scope="session")
def far_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Docker daemon that sees neither this checkout nor what tests write."""
    if (why := engines.why_not()) is not None:
        pytest.skip(why)
    with engines.far_daemon([PROJECT, tmp_path_factory.getbasetemp(), Path("/var/tmp")]) as address:
        yield address


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How sandboxes come to their directories: `mounts`, unless the test asks for `volume`, of an engine far away."""
    wanted = str(getattr(request, "param", "mounts"))
    if wanted == "volume":
        monkeypatch.setenv("DOCKER_HOST", request.getfixturevalue("far_engine"))
    return wanted


@pytest.fixture(scope="session")
def tools_archive(project: Cli) -> Path:
    """The tools image, as the store has it."""
    return project.realize("image-tools")[0]


@pytest.fixture
def tools_image(tools_archive: Path, way: str) -> str:
    """The id of the tools image, loaded."""
    identity = str(image_id(tools_archive))
    sandbox.load_image(tools_archive, identity)
    return identity


@pytest.fixture(scope="session")
def scratches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs have their scratch directories: as in a store, so that the engine is asked once what it sees of it."""
    place = tmp_path_factory.mktemp("jobs") / disk.PRIVATE
    place.mkdir()
    return place


@pytest.fixture
def new_job(tmp_path: Path, scratches: Path, tools_image: str, way: str) -> Iterator[Callable[..., sandbox.Job]]:
    """Makes a Job running a shell script, with a label of its own; whatever it leaves behind fails the test."""
    made: list[sandbox.Job] = []

    def make(script: str, **changes: Any) -> sandbox.Job:
        label = f"test-{uuid.uuid4().hex[:12]}"
        scratch = scratches / label
        scratch.mkdir(mode=0o700)
        fields: dict[str, Any] = {
            "label": label,
            "image": tools_image,
            "command": ("sh", "-c", script),
            "scratch": scratch,
            "log": tmp_path / f"{label}.log",
            "source_date_epoch": sandboxes.EPOCH,
            "cores": 2,
        }
        job = sandbox.Job(**(fields | changes))
        made.append(job)
        return job

    yield make
    left = {job.label: sandboxes.containers(job.label) for job in made}
    for names in left.values():
        if names:
            subprocess.run(["docker", "rm", "--force", "--volumes", *names], check=True, capture_output=True)
    assert not any(left.values())
    assert way == "mounts" or sandboxes.volumes() == []


@pytest.fixture
def container(oci: Oci) -> Iterator[str]:
    """An id that is free again afterwards, whatever happened."""
    yield "web"
    if "web" in oci.left():
        oci("delete", "--force", "web")


@pytest.fixture(scope="session")
def seeded(project: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the tools image, to be copied."""
    store = tmp_path_factory.mktemp("seed") / "store"
    Cli(project.root, store).realize("image-tools")
    return store


@pytest.fixture
def small(tmp_path: Path, seeded: Path) -> Cli:
    """A workspace with two little recipes (`high` is made from `low`), a store of its own with the tools image, and
    a machine cache of its own."""
    return make_small(tmp_path, seeded)


def make_small(place: Path, seeded: Path) -> Cli:
    """What `small` is, in `place`."""
    root = place / "small"
    shutil.copytree(PROJECT / "recipes" / "toolchain", root / "recipes" / "toolchain")
    shutil.copy(PROJECT / "lock.toml", root)
    store = place / "store"
    shutil.copytree(seeded, store, symlinks=True)
    cli = Cli(
        root,
        store,
        {
            "VZREPRO_MACHINE_CACHE_DIR": str(place / "cache"),
            "VZREPRO_KEY_DIR": str(place / "keys"),
            "XDG_CACHE_HOME": str(place / "xdg"),
        },
    )
    cli.write(small=SMALL)
    (root / "recipes" / "small" / "low.sh").write_text(LOW_SH)
    return cli


def interrupt_when(
    process: subprocess.Popen[str], text: str, number: int = signal.SIGINT, *, inside: Cli | None = None
) -> tuple[str, str]:
    """Send a signal once `text` has been written to stderr, and, with `inside`, a container of that store is there;
    return what was written on both.

    A process that is killed before that leaves a Docker client that goes on, and a container for the next sweep but
    one.
    """
    assert process.stderr is not None
    assert process.stdout is not None
    lines: list[str] = []
    out: list[str] = []
    reader = threading.Thread(target=lambda: out.append(process.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    sent = False
    for line in process.stderr:
        lines.append(line)
        if text in line and not sent:
            while inside is not None and not containers(inside):
                assert process.poll() is None, "".join(lines)
            process.send_signal(number)
            sent = True
    process.wait(PATIENCE_SECS)
    reader.join()
    assert sent, f"{text!r} was never written:\n{''.join(lines)}"
    return "".join(out), "".join(lines)


def containers(cli: Cli, *filters: str) -> list[str]:
    """The names of all containers (or of those that Docker's `filters` let pass), running or not, that have something
    of this store mounted."""
    ps = ["docker", "ps", "-aq", *(f"--filter={each}" for each in filters)]
    names = subprocess.run(ps, capture_output=True, text=True, check=True).stdout.split()
    if not names:
        return []
    # One that another test's vzrepro removes meanwhile makes the command fail, and is none of ours.
    inspect = ["docker", "inspect", "--format", "{{.Name}} {{json .Mounts}} {{json .HostConfig}}", *names]
    listed = subprocess.run(inspect, capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in listed.splitlines() if str(cli.store) in line]


@pytest.fixture
def mounted() -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with these options: `mounted("size=1m")` gives its directory; sockets fit below it. Needs root."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = Path(tempfile.mkdtemp(prefix="vz-test-"))
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()
