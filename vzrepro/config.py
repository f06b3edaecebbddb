"""Configuration: where things are and how fast to go. Nothing here ever enters a hash.

Three places, each overriding the one before: `[tool.vzrepro]` in the workspace's pyproject.toml, the user's
`vzrepro/config.toml` below the platform's configuration directory, and `VZREPRO_*` in the environment. Revoked keys
add up instead: who has revoked a key must not be overridden by somebody who has not heard of it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vzrepro.errors import UsageError, first_fault

USER_FILE = Path(platformdirs.user_config_dir("vzrepro")) / "config.toml"
"""The user's own configuration file; it may be missing."""

_GIB = 1 << 30
_REVOKED = "revoked-keys"


class Config(BaseModel):
    """All settings, with their defaults. Keys are written with dashes in files (`machine-cache`).

    `store`, `upload_key` and `debian_keyring` (the archive's OpenPGP keys, for `lock`) are relative to the workspace;
    `cores` is what one build may use, `jobs` how many builds run at once (0: decided from the machine); `mirrors` maps
    a `mirror://` name to URL prefixes, tried first; sizes are GiB.

    `caches` are shared binary caches (`s3://`, `https://`, `file://`), asked in this order; `trusted_keys` and
    `revoked_keys` are public keys (`name:base64`), `require_signatures` how many trusted keys must have signed what is
    taken. With `upload_key`, the file of a secret key, what is made here is pushed to `push_to`, by default the first
    cache that can be written. `cache_patience_secs` is what failures of one cache may cost in a run. In the
    environment, lists are separated by blanks.
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
    upload_key: Path | None = None
    push_to: str | None = None
    cache_patience_secs: Annotated[float, Field(gt=0)] = 30.0
    mirrors: dict[str, list[str]] = {}
    debian_keyring: Path = Path("recipes/toolchain/debian-archive.asc")
    cores: Annotated[int, Field(ge=0)] = 0
    jobs: Annotated[int, Field(ge=0)] = 0
    memory_gib: Annotated[int, Field(gt=0)] | None = None

    def build_cores(self) -> int:
        """Parallel processes one build may start."""
        return self.cores or _host_cores()

    def build_jobs(self) -> int:
        """Builds that run at the same time: two at least, since each has stretches that keep one core busy."""
        return self.jobs or max(2, min(4, _host_cores() // 2))

    def memory_bytes(self, asked: int | None) -> int | None:
        """The memory limit of one build: the recipe's wish, bounded by the user's."""
        limit = None if self.memory_gib is None else self.memory_gib * _GIB
        if asked is None or limit is None:
            return asked or limit
        return min(asked, limit)


def find_workspace(start: Path) -> Path:
    """The nearest directory at or above `start` that has `recipes/`. Raises UsageError when there is none."""
    start = start.resolve()
    for folder in (start, *start.parents):
        if (folder / "recipes").is_dir():
            return folder
    raise UsageError(
        f"no workspace: neither {start} nor a directory above it has recipes/",
        hint="change into a checkout, or name one: vzrepro -C DIR …",
    )


def load(root: Path, environ: Mapping[str, str] | None = None, user_file: Path = USER_FILE) -> Config:
    """The configuration for the workspace `root`.

    Raises UsageError naming file or variable, key and fault.
    """
    environ = os.environ if environ is None else environ
    project = root / "pyproject.toml"
    places = (
        _checked(_toml(project).get("tool", {}).get("vzrepro", {}), str(project)),
        _checked(_toml(user_file), str(user_file)),
        _from_environment(environ),
    )
    values: dict[str, Any] = {key: value for place in places for key, value in place.items()}
    values[_REVOKED] = [key for place in places for key in place.get(_REVOKED, [])]
    config = Config.model_validate(values)
    paths = {name: root / getattr(config, name).expanduser() for name in ("store", "debian_keyring")}
    if config.upload_key is not None:
        paths["upload_key"] = root / config.upload_key.expanduser()
    return config.model_copy(update=paths)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as TOML", reason=str(error)) from error


def _checked(values: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    try:
        Config.model_validate(values)
    except ValidationError as error:
        known = ", ".join(sorted(field.alias or name for name, field in Config.model_fields.items()))
        raise UsageError(f"{place}: {first_fault(error)}", hint=f"the settings are: {known}") from error
    return values


def _from_environment(environ: Mapping[str, str]) -> Mapping[str, Any]:
    """`VZREPRO_CORES=4` sets `cores`; `VZREPRO_MIRRORS` has a form of its own, which `vzrepro.fetch` reads."""
    values: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if name == "mirrors":
            continue
        variable = f"VZREPRO_{name.upper()}"
        text = environ.get(variable)
        if not text:
            continue
        alias = field.alias or name
        values[alias] = text.split() if field.default == [] else text
        _checked({alias: values[alias]}, variable)
    return values


def _host_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
