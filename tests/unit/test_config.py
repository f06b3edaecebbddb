"""Configuration: three places in order, and mistakes named with their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from vzrepro.base.config import Config, find_workspace, host_memory, load, usual_jobs
from vzrepro.base.errors import UsageError


def _load(root: Path, environ: dict[str, str] | None = None, user: str = "") -> Config:
    file = root / "user.toml"
    file.write_text(user)
    return load(root, environ or {}, file)


def test_later_places_win(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.vzrepro]\ncores = 1\njobs = 1\nstore = "project"\n')
    config = _load(tmp_path, {"VZREPRO_CORES": "3"}, "cores = 2\njobs = 2\n")
    assert (config.cores, config.jobs, config.store) == (3, 2, tmp_path / "project")


def test_defaults(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert config.store == tmp_path / "store"
    assert config.machine_cache
    assert config.build_cores() >= 1
    assert config.build_jobs() >= 1


def test_times_are_shared_by_the_cores_of_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.vzrepro.times]\nkernel = [60, 800]\n"a+b" = [1, 0]\n')
    config = _load(tmp_path, {"VZREPRO_TIMES": "kernel"})
    for cores, jobs, kernel, other in ((1, 2, 1720, 2), (2, 2, 860, 1), (16, 8, 160, 1), (16, 1, 110, 1)):
        monkeypatch.setattr("vzrepro.base.config.host_cores", lambda cores=cores: cores)
        assert config.model_copy(update={"jobs": jobs}).reference_secs() == {"kernel": kernel, "a+b": other}
    assert config.model_copy(update={"cores": 2, "jobs": 1}).reference_secs()["kernel"] == 460


def test_as_many_builds_at_once_as_cores_and_memory_are_there_for() -> None:
    gib = 1 << 30
    assert [usual_jobs(cores, 32 * gib) for cores in (1, 2, 4, 8, 64)] == [2, 2, 4, 8, 8]
    assert [usual_jobs(8, memory) for memory in (0, 8 * gib, 16 * gib)] == [2, 2, 4]
    assert host_memory() > 0


def test_a_teams_settings(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.vzrepro]\ncaches = ["s3://a?x=1&y=2"]\nupload-key = "keys/team"\n')
    config = _load(tmp_path)
    assert config.caches == ["s3://a?x=1&y=2"]
    assert config.upload_key == tmp_path / "keys" / "team"
    assert config.require_signatures == 1
    config = _load(tmp_path, {"VZREPRO_CACHES": " https://a/b  s3://c?d=e&f ", "VZREPRO_CACHE_PATIENCE_SECS": "0.5"})
    assert config.caches == ["https://a/b", "s3://c?d=e&f"]
    assert config.cache_patience_secs == 0.5


def test_revoked_keys_add_up_while_trusted_ones_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.vzrepro]\nrevoked-keys = ["a"]\ntrusted-keys = ["x"]\n')
    config = _load(tmp_path, {"VZREPRO_REVOKED_KEYS": "c d"}, 'revoked-keys = ["b"]\ntrusted-keys = ["y"]\n')
    assert config.revoked_keys == ["a", "b", "c", "d"]
    assert config.trusted_keys == ["y"]


def test_absolute_store(tmp_path: Path) -> None:
    assert _load(tmp_path, {"VZREPRO_STORE": "/elsewhere"}).store == Path("/elsewhere")


@pytest.mark.parametrize(
    ("user", "environ", "complaint"),
    [
        ("nonsense = 1\n", {}, "user.toml: nonsense"),
        ("cores = -1\n", {}, "user.toml: cores"),
        ("times = { a = [1, -1] }\n", {}, "user.toml: times.a"),
        ("cores = [", {}, "user.toml: cannot be read as TOML"),
        ("cores = " + "9" * 5000, {}, "user.toml: cannot be read as TOML"),
        ("cores = " + "[" * 5000, {}, "user.toml: cannot be read as TOML"),
        ("", {"VZREPRO_JOBS": "many"}, "VZREPRO_JOBS: jobs"),
        ("require-signatures = 0", {}, "user.toml: require-signatures"),
        ("cache-patience-secs = 0", {}, "user.toml: cache-patience-secs"),
        ('caches = "s3://a"', {}, "user.toml: caches"),
        ("", {"VZREPRO_MACHINE_CACHE": "perhaps"}, "VZREPRO_MACHINE_CACHE: machine-cache"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, user: str, environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        _load(tmp_path, environ, user)
    assert complaint in caught.value.message


@pytest.mark.parametrize(
    ("asked", "limit", "wanted"),
    [(None, None, None), (5 << 30, None, 5 << 30), (5 << 30, 2, 2 << 30), (None, 2, 2 << 30)],
)
def test_memory_is_bounded_by_the_user(asked: int | None, limit: int | None, wanted: int | None) -> None:
    assert Config.model_validate({"memory-gib": limit}).memory_bytes(asked) == wanted


@pytest.mark.parametrize(("asked", "gib"), [(None, 100), (5 << 30, 5), (500 << 30, 100)])
def test_disk_space_is_bounded_by_the_user(asked: int | None, gib: int) -> None:
    assert Config().disk_bytes(asked) == gib << 30
    assert Config.model_validate({"disk-gib": 2}).disk_bytes(asked) == 2 << 30


def test_workspace_is_found_upwards(tmp_path: Path) -> None:
    deep = tmp_path / "ws" / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "ws" / "recipes").mkdir()
    assert find_workspace(deep) == (tmp_path / "ws").resolve()
    with pytest.raises(UsageError, match="no workspace"):
        find_workspace(tmp_path)
