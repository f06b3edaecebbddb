"""Configuration: where things are and how fast to go. Nothing here ever enters a hash.

Three places, each overriding the one before: `[tool.vzrepro]` in the workspace's pyproject.toml, the user's
`vzrepro/config.toml` below the platform's configuration directory, and `VZREPRO_*` in the environment. Revoked keys
add up instead: who has revoked a key must not be overridden by somebody who has not heard of it. Trusted workspaces add
up as well, and no workspace can name itself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import vzrepro
from vzrepro.base import trust
from vzrepro.base.errors import Untrusted, UsageError, first_fault

USER_FILE = Path(platformdirs.user_config_dir("vzrepro")) / "config.toml"
"""The user's own configuration file; it may be missing."""

_GIB = 1 << 30
_OLDEST = r">=([0-9]{1,9}(?:\.[0-9]{1,9})*)"
_PACKAGE = Path(__file__).resolve().parents[1]
_REVOKED = "revoked-keys"
_TRUSTED = "trusted-workspaces"


_Secs = Annotated[float, Field(ge=0)]


class Config(BaseModel):
    """All settings, with their defaults. Keys are written with dashes in files (`machine-cache`).

    `store`, `upload_key` and `debian_keyring` (OpenPGP keys for `lock`, instead of Debian's own, which come with
    vzrepro) are relative to the workspace;
    `cores` is what one build may use, `jobs` how many builds run at once (0: decided from the machine); `memory_gib`
    and `disk_gib` (/build and /out together) bound what a recipe asks for one build; `download_gib` what a download may
    have whose size nobody has pinned, and what may come from one git repository; `mirrors` maps a `mirror://` name to
    URL prefixes, tried first; sizes are GiB.

    `caches` are shared binary caches (`s3://`, `https://`, `file://`), asked in this order; `trusted_keys` and
    `revoked_keys` are public keys (`name:base64`), `require_signatures` how many trusted keys must have signed what is
    taken. With `upload_key`, the file of a secret key, what is made here is pushed to `push_to`, by default the first
    cache that can be written. `cache_patience_secs` is what failures of one cache may cost in a run. In the
    environment, lists are separated by blanks.

    `farm` is where builds are handed to (docs/farm.md): `temporal://HOST:PORT/NAMESPACE`, or `command: …`. `farm_ca`,
    `farm_cert` with `farm_cert_key`, and `farm_token` are files for the server's TLS and the client's proof of who it
    is. A worker builds for `farm_clients` only, public keys, if any are named.

    `times` says how long targets take on one core of some machine: the seconds that no further core would save, and
    those that several share. Plans go by it for what this machine has not built yet.

    `required_version` (`>=0.2`) is the oldest vzrepro that understands the workspace.

    `trusted_workspaces` are workspaces that are used whoever can write to them (docs/design.md): absolute paths,
    `/srv/*` for all below, `*` for every one.
    """

    model_config = ConfigDict(extra="forbid", alias_generator=lambda name: name.replace("_", "-"), frozen=True)

    store: Path = Path("store")
    platform: str = "linux/amd64"
    machine_cache: bool = True
    machine_cache_dir: Path = Path(platformdirs.user_cache_dir("vzrepro")) / "cache"
    machine_cache_gib: Annotated[int, Field(gt=0)] = 30
    key_dir: Path = Path(platformdirs.user_data_dir("vzrepro")) / "keys"
    caches: list[str] = []
    trusted_keys: list[str] = []
    revoked_keys: list[str] = []
    require_signatures: Annotated[int, Field(gt=0)] = 1
    trusted_workspaces: list[Annotated[str, Field(pattern=r"^([/~].*|\*)$")]] = []
    upload_key: Path | None = None
    push_to: str | None = None
    cache_patience_secs: Annotated[float, Field(gt=0)] = 30.0
    farm: str | None = None
    farm_ca: Path | None = None
    farm_cert: Path | None = None
    farm_cert_key: Path | None = None
    farm_token: Path | None = None
    farm_clients: list[str] = []
    mirrors: dict[str, list[str]] = {}
    debian_keyring: Path | None = None
    cores: Annotated[int, Field(ge=0)] = 0
    jobs: Annotated[int, Field(ge=0)] = 0
    memory_gib: Annotated[int, Field(gt=0)] | None = None
    disk_gib: Annotated[int, Field(gt=0)] = 100
    download_gib: Annotated[int, Field(gt=0)] = 2
    times: dict[str, tuple[_Secs, _Secs]] = {}
    required_version: Annotated[str, Field(pattern=f"^{_OLDEST}$")] | None = None

    def build_cores(self) -> int:
        """Parallel processes one build may start."""
        return self.cores or host_cores()

    def build_jobs(self) -> int:
        """Builds that run at the same time."""
        return self.jobs or usual_jobs(host_cores(), host_memory())

    def reference_secs(self) -> dict[str, float]:
        """How long builds take by `times`, when two at a time share this machine's cores evenly: more of them at once
        hardly hold up the most urgent ones."""
        share = min(self.build_cores(), host_cores() / min(2, self.build_jobs()))
        return {target: alone / min(1.0, share) + shared / share for target, (alone, shared) in self.times.items()}

    def memory_bytes(self, asked: int | None) -> int | None:
        """The memory limit of one build: the recipe's wish, bounded by the user's."""
        limit = None if self.memory_gib is None else self.memory_gib * _GIB
        if asked is None or limit is None:
            return asked or limit
        return min(asked, limit)

    def disk_bytes(self, asked: int | None) -> int:
        """What one build's /build and /out may hold together: the recipe's wish, bounded by the user's."""
        limit = self.disk_gib * _GIB
        return limit if asked is None else min(asked, limit)

    def download_bytes(self) -> int:
        """What a download of unknown size may have, and what may come from one git repository."""
        return self.download_gib * _GIB


def nearest_workspace(start: Path) -> Path | None:
    """The nearest directory at or above `start` that has `recipes/`, whoever made it."""
    start = start.resolve()
    # vzrepro's own package has recipes, too, which are for others to use.
    ways = (folder for folder in (start, *start.parents) if folder != _PACKAGE)
    return next((folder for folder in ways if (folder / "recipes").is_dir()), None)


def find_workspace(start: Path, environ: Mapping[str, str] | None = None, user_file: Path = USER_FILE) -> Path:
    """The nearest directory at or above `start` that has `recipes/`.

    Raises UsageError when there is none, and Untrusted as `check_trusted` does.
    """
    root = nearest_workspace(start)
    if root is None:
        raise UsageError(
            f"no workspace: neither {start.resolve()} nor a directory above it has recipes/",
            hint="change into a checkout, or name one: vzrepro -C DIR …",
        )
    check_trusted(root, map(Path, trust.relied_on(str(root))), environ, user_file)
    return root


def check_trusted(
    root: Path, paths: Iterable[Path], environ: Mapping[str, str] | None = None, user_file: Path = USER_FILE
) -> None:
    """Raises Untrusted when somebody else made one of `paths`, which are files of the workspace `root`, or can write to
    it, unless the user trusts this workspace."""
    environ = os.environ if environ is None else environ
    found = trust.doubt(map(str, paths), environ)
    if found is None:
        return
    path, why, mended = found
    of_user = _checked(_toml(user_file), str(user_file)).get(_TRUSTED, [])
    for entry in (*of_user, *_from_environment(environ).get(_TRUSTED, [])):
        if _covers(entry, root):
            return
    line = f"{_TRUSTED} = {json.dumps([*of_user, str(root)], ensure_ascii=False)}"
    variable = f"VZREPRO_{_TRUSTED.replace('-', '_').upper()}"
    raise Untrusted(
        f"the workspace {root} is not trusted: {path}: {why}",
        reason=f"what is in a workspace decides what vzrepro does as {trust.user(os.geteuid())}",
        hint=(f"{mended}\nor, " if mended else "")
        + f"if you trust whoever can write there, {'change the' if of_user else 'put this'} line in {user_file}"
        + f"{' to' if of_user else ''}:\n{line}\n"
        + f"or for one run: {variable}={shlex.quote(str(root))} vzrepro …",
    )


def _covers(entry: str, root: Path) -> bool:
    if entry == "*":
        return True
    if entry.endswith("/*"):
        return Path(entry[:-2]).expanduser().resolve() in root.parents
    return Path(entry).expanduser().resolve() == root


def load(root: Path, environ: Mapping[str, str] | None = None, user_file: Path = USER_FILE) -> Config:
    """The configuration for the workspace `root`, or of a directory that stands in for one.

    Raises UsageError naming file or variable, key and fault; Untrusted when somebody else wrote its pyproject.toml.
    """
    environ = os.environ if environ is None else environ
    project = root / "pyproject.toml"
    check_trusted(root, [project], environ, user_file)
    places = (
        _checked(_of_project(project), str(project)),
        _checked(_toml(user_file), str(user_file)),
        _from_environment(environ),
    )
    values: dict[str, Any] = {key: value for place in places for key, value in place.items()}
    for name in (_REVOKED, _TRUSTED):
        values[name] = [entry for place in places for entry in place.get(name, [])]
    config = Config.model_validate(values)
    files = ("store", "debian_keyring", "upload_key", "farm_ca", "farm_cert", "farm_cert_key", "farm_token")
    given = {name: getattr(config, name) for name in files}
    paths = {name: root / path.expanduser() for name, path in given.items() if path is not None}
    return config.model_copy(update=paths)


def _of_project(project: Path) -> Mapping[str, Any]:
    tool = _toml(project).get("tool", {})
    settings: Mapping[str, Any] = tool.get("vzrepro", {}) if isinstance(tool, dict) else {}
    if not isinstance(settings, dict):
        raise UsageError(
            f"{project}: tool.vzrepro is not a table", hint="write it as [tool.vzrepro], settings below it"
        )
    _check_version(project, settings.get("required-version"))
    if _TRUSTED in settings:
        raise UsageError(
            f"{project}: {_TRUSTED}: a workspace cannot say that it is to be trusted",
            hint=f"this setting is the user's: {USER_FILE}",
        )
    return settings


def _check_version(project: Path, wanted: object) -> None:
    """Before the other settings, which a newer vzrepro may have more of."""
    if wanted is None:
        return
    oldest = re.fullmatch(_OLDEST, wanted) if isinstance(wanted, str) else None
    if oldest is None:
        raise UsageError(
            f"{project}: required-version is {wanted!r}, and not the oldest vzrepro that will do",
            hint=f'write it as: required-version = ">={vzrepro.__version__}"',
        )
    if _numbers(oldest[1]) > _numbers(vzrepro.__version__):
        from vzrepro.base import version

        raise UsageError(
            f"{project.parent} is a workspace for vzrepro {oldest[1]} or later, and this is {vzrepro.__version__}",
            hint=f"install a newer one: {version.upgrading()}",
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as TOML", reason=str(error)) from error


def _checked(values: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    try:
        Config.model_validate(values)
    except ValidationError as error:
        known = ", ".join(sorted(field.alias or name for name, field in Config.model_fields.items()))
        raise UsageError(f"{place}: {first_fault(error)}", hint=f"the settings are: {known}") from error
    return values


def _from_environment(environ: Mapping[str, str]) -> Mapping[str, Any]:
    """`VZREPRO_CORES=4` sets `cores`; `VZREPRO_MIRRORS` has a form of its own, which `vzrepro.sources.fetch` reads, and
    `times` is in files only."""
    values: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if name in ("mirrors", "times"):
            continue
        variable = f"VZREPRO_{name.upper()}"
        text = environ.get(variable)
        if not text:
            continue
        alias = field.alias or name
        values[alias] = text.split() if field.default == [] else text
        _checked({alias: values[alias]}, variable)
    return values


def usual_jobs(cores: int, memory_bytes: int) -> int:
    """Builds that run at the same time, unless it is told otherwise: two at least, since each has stretches that keep
    one core busy, and no more than have 4 GiB each, half of what one may usually take."""
    return max(2, min(8, cores, memory_bytes // (4 * _GIB)))


def host_memory() -> int:
    """Bytes of memory that the machine has; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def host_cores() -> int:
    """CPUs that this process may use; where the system does not say, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
