"""What recipes want pinned → `Lock`: the only code that talks to an index.

Debian suites are read through their signed InRelease; crates come from the index and from the Cargo.lock of the
program that needs them; what other sources ask for, each kind resolves itself (`_RESOLVERS`). What is pinned already,
and still what the recipe asks for, is left alone.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from vzrepro.base import events
from vzrepro.base.errors import Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.recipe.confined import evaluate
from vzrepro.recipe.graph import Want, WantKind
from vzrepro.recipe.lock import CratePin, CrateSetPin, DebPin, ImagePin, Lock, PinnedFile, PinnedTree, SourcePin
from vzrepro.sources import crates, debian, fetch, git, lookup, pypi, url

_MAX_INDEX_BYTES = 256 << 20
_MAX_CRATE_ENTRY = 32 << 20

_RESOLVERS: Mapping[WantKind, lookup.Resolver] = {
    "git-source": git.resolve,
    "pypi-source": pypi.resolve,
    "url-source": url.resolve,
}

_MOST_UNANSWERED = 2
"""Pins whose places do not answer until no other is tried: where there is no network, each costs a minute."""

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class MovedPin:
    """One pin that changed: what it pins, and its version or size before and after (None: it was not there)."""

    what: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Unpinned:
    """A pin that was not made, and why; None: nobody has tried, since too much had failed already."""

    want: Want
    error: VzreproError | None


@dataclass(slots=True)
class Pinner:
    """One run of `vzrepro lock`; `unpinned` is afterwards what it could not do.

    `keyring` is the file with the Debian archive's OpenPGP keys; `downloads` a directory that keeps crates;
    `update` names the pins to move within their series although they are valid (None: all of them). `max_bytes` is what
    a download of unknown size may have; `say` is told a line, `report` what is under way.
    """

    root: Path
    platform: str
    mirrors: fetch.Mirrors
    keyring: Path
    downloads: Path
    now: dt.datetime
    update: Collection[str] | None = ()
    allow_expired: bool = False
    say: Callable[[str], None] = lambda _line: None
    report: events.Report = events.ignore
    max_bytes: int = 2 << 30
    stop: threading.Event = field(default_factory=threading.Event)
    unpinned: list[Unpinned] = field(default_factory=list)
    _before: Mapping[str, SourcePin] = field(default_factory=dict)
    _indexes: dict[str, debian.Index] = field(default_factory=dict)
    _programs: Mapping[str, SourcePin] = field(default_factory=dict)

    def resolve(self, lock: Lock) -> Lock:
        """The lock that satisfies every recipe of the workspace, but for what is `unpinned` then: that is as it was.
        Pins that nothing asks for are gone.

        Evaluates twice: which crates a published program needs is known once the program itself is pinned.
        Raises UsageError (recipes, unknown names), Interrupted.
        """
        wants = evaluate(self.root, lock, self.platform, lenient=True).wants
        self._check_names(wants)
        self._before = lock.sources
        lock = replace(
            lock,
            sources=self._each(wants, ("debian-source", "crate-source", *_RESOLVERS), lock.sources, self._source),
            images={
                **{key: pin for key, pin in lock.images.items() if key[1] != self.platform and _wanted(wants, key[0])},
                **{
                    (name, self.platform): pin
                    for name, pin in self._each(
                        wants,
                        ("image",),
                        {name: pin for (name, platform), pin in lock.images.items() if platform == self.platform},
                        self._image,
                    ).items()
                },
            },
        )
        try:
            wants = evaluate(self.root, lock, self.platform, lenient=True).wants
        except UsageError:
            if not self.unpinned:
                raise
            return lock  # a recipe that needs to know what could not be pinned
        self._programs = lock.sources
        # A crate set follows from a Cargo.lock, so there is nothing to move it to: it is never updated by name.
        return replace(lock, crate_sets=self._each(wants, ("crates",), lock.crate_sets, self._crate_set, follow=True))

    def _check_names(self, wants: Iterable[Want]) -> None:
        names = {want.name for want in wants}
        for name in self.update or ():
            if name in names:
                continue
            # Targets are called after their pins.
            pin = name.partition("-")[2]
            raise UsageError(
                f"nothing called {name!r} is pinned",
                reason=f"the pins are: {', '.join(sorted(names)) or 'none, so nothing can be moved'}",
                hint=f"the pin behind that target: vzrepro lock --update {pin}" if pin in names else None,
            )

    def _each(
        self,
        wants: Sequence[Want],
        kinds: tuple[str, ...],
        pins: Mapping[str, P],
        resolve: Callable[[Want], P],
        *,
        follow: bool = False,
    ) -> dict[str, P]:
        """The pins for all wants of some kinds: kept where they still answer, else resolved."""
        found: dict[str, P] = {}
        for want in wants:
            if want.kind not in kinds:
                continue
            old = pins.get(want.name)
            moving = not follow and (self.update is None or want.name in self.update)
            if old is not None and old.request == want.request and not moving:  # type: ignore[attr-defined]
                found[want.name] = old
                continue
            made = self._pin(want, resolve)
            # A pin that cannot be made, or moved, takes nothing from the others: each is whole by itself.
            kept = old if made is None else made
            if kept is not None:
                found[want.name] = kept
        return found

    def _pin(self, want: Want, resolve: Callable[[Want], P]) -> P | None:
        unanswered = sum(_is_unanswered(each.error) for each in self.unpinned)
        # A set of crates follows from its program.
        waits = any(each.want.name == want.ask.get("source") for each in self.unpinned)
        if waits or unanswered >= _MOST_UNANSWERED:
            self.unpinned.append(Unpinned(want, None))
            return None
        self.say(f"resolving {want.kind} {want.name}")
        try:
            return resolve(want)
        except Interrupted:
            raise
        except UsageError as error:
            error = UsageError(f"{want.place}: {error.message}", reason=error.reason, hint=error.hint)
            self.unpinned.append(Unpinned(want, error))
        except VzreproError as error:
            self.unpinned.append(Unpinned(want, error))
        return None

    def _get(self, url: str, max_size: int = _MAX_INDEX_BYTES) -> bytes:
        return fetch.get(self.mirrors.urls(url), max_size)

    def _index(self, suite: str) -> debian.Index:
        if suite not in self._indexes:
            try:
                keyring = self.keyring.read_bytes()
            except OSError as error:
                raise UsageError(
                    f"{self.keyring}: the Debian archive's keys cannot be read",
                    reason=str(error.strerror),
                    hint="debian-keyring in [tool.vzrepro] names this file; without, Debian's own keys are used",
                ) from error
            self._indexes[suite] = debian.Index(
                self._get, keyring, suites=debian.suites(suite), now=self.now, allow_expired=self.allow_expired
            )
        return self._indexes[suite]

    def _source(self, want: Want) -> SourcePin:
        if (resolve := _RESOLVERS.get(want.kind)) is not None:
            target, path = f"source-{want.name}", f"lock:{want.name}"

            def progress(done: int, total: int | None) -> None:
                self.report(events.Progress(target, path, done, total))

            def warn(line: str) -> None:
                self.report(events.Notice("warning", line))

            tools = lookup.Lookup(
                self.mirrors, self.root, self.downloads, self.max_bytes, self.say, warn, progress, self.stop
            )
            with events.working(self.report, events.Started(target, path, "fetch")):
                return resolve(want, self._before.get(want.name), tools)
        series = str(want.ask["series"])
        if want.kind == "crate-source":
            version, sha256 = self._newest_crate(want.name, series)
            file = self._crate_file(crates.Crate(want.name, version, sha256))
            return SourcePin(want.request, version, file)
        packages = self._index(str(want.ask["suite"])).sources(want.name, series)
        found = next((package for package in packages if fetch.served(self.mirrors.urls(package.url))), None)
        if found is None:
            raise RemoteError(
                f"no mirror has {want.name} {packages[0].upstream}, nor another version of the series {series}",
                hint="name a complete mirror: export VZREPRO_MIRRORS='debian=https://…'",
            )
        if found is not packages[0]:
            self.say(f"{want.name} {packages[0].upstream} is in the index, but no mirror has its file yet")
        return SourcePin(want.request, found.upstream, PinnedFile(found.url, found.sha256, found.size))

    def _newest_crate(self, name: str, series: str) -> tuple[str, FileHash]:
        """The highest version of `series` that is not yanked (Cargo book, "Index Format")."""
        entries = crates.index_entries(self._get(fetch.index_url(name), _MAX_CRATE_ENTRY), name)
        fitting = [entry for entry in entries if entry.version.in_series(series)]
        taken = max((each for each in fitting if not each.yanked), key=lambda each: each.version.rank, default=None)
        if taken is None and fitting:
            yanked = ", ".join(entry.version.text for entry in fitting)
            raise UsageError(
                f"crate {name}: every version of the series {series} is yanked",
                reason=f"its publisher has withdrawn {yanked}",
                hint="name another series, or take the crate from a Cargo.lock that has it",
            )
        if taken is None:
            raise UsageError(
                f"crate {name} has no version in the series {series}",
                reason=f"the index has {', '.join(entry.version.text for entry in entries[-8:]) or 'none'}",
                hint="a pre-release is taken only where it is named in full",
            )
        return taken.version.text, taken.sha256

    def _image(self, want: Want) -> ImagePin:
        index = self._index(str(want.ask["suite"]))
        packages = [*_strings(want.ask["packages"]), *_strings(want.ask["foreign"])]
        without = dict.fromkeys(_strings(want.ask["without"]), "")
        debs = index.resolve(packages, native=_debian_arch(self.platform), without=without)
        return ImagePin(
            want.request,
            index.snapshot,
            tuple(
                sorted(
                    (DebPin(d.name, d.version, d.arch, PinnedFile(d.url, d.sha256, d.size)) for d in debs),
                    key=lambda deb: deb.key,
                )
            ),
        )

    def _crate_set(self, want: Want) -> CrateSetPin:
        if "source" in want.ask:
            source = self._programs[str(want.ask["source"])]
            assert isinstance(source.file, PinnedFile)
            crate = crates.Crate(str(want.ask["source"]), source.version, source.file.sha256)
            self._download([crate])
            program = (self.downloads / crate.sha256.hex).read_bytes()
            manifest, lock = crates.manifest_of(program), crates.lock_of(program)
        else:
            folder = self.root / str(want.ask["directory"])
            manifest, lock = _text(folder / "Cargo.toml"), _text(folder / "Cargo.lock")
        reached = crates.reached(
            lock,
            manifest,
            self._manifests,
            features=_strings(want.ask["features"]),
            default_features=bool(want.ask["default_features"]),
            targets=_strings(want.ask["targets"]),
        )
        pins = (CratePin(crate.name, crate.version, self._crate_file(crate)) for crate in reached)
        return CrateSetPin(want.request, tuple(sorted(pins, key=lambda crate: crate.key)))

    def _manifests(self, wave: Sequence[crates.Crate]) -> Mapping[crates.Crate, str]:
        self._download(wave)
        return {crate: crates.manifest_of((self.downloads / crate.sha256.hex).read_bytes()) for crate in wave}

    def _crate_file(self, crate: crates.Crate) -> PinnedFile:
        self._download([crate])
        size = (self.downloads / crate.sha256.hex).stat().st_size
        return PinnedFile(_crate_url(crate), crate.sha256, size)

    def _download(self, wave: Sequence[crates.Crate]) -> None:
        missing = [crate for crate in wave if not (self.downloads / crate.sha256.hex).is_file()]
        if not missing:
            return
        self.say(f"downloading {len(missing)} crates" if len(missing) > 1 else f"downloading {missing[0].file_name}")
        fetch.download_all(
            [
                fetch.Download(self.mirrors.urls(_crate_url(crate)), self.downloads / crate.sha256.hex, crate.sha256)
                for crate in missing
            ]
        )


def _is_unanswered(error: VzreproError | None) -> bool:
    return isinstance(error, RemoteError) and not isinstance(error, fetch.NotFound)


def failure(unpinned: Sequence[Unpinned]) -> VzreproError | None:
    """The error to end with: that of the only pin that could not be made, or one, of the first's class, with all."""
    errors = [each.error for each in unpinned if each.error is not None]
    if len(unpinned) < 2:
        return errors[0] if errors else None
    lines = []
    for each in unpinned:
        said = "not tried" if each.error is None else "; ".join(each.error.in_a_line.splitlines())
        lines.append(f"{each.want.kind} {each.want.name}: {said}")
    hints = [error.hint for error in errors if error.hint]
    return type(errors[0])(
        f"{len(unpinned)} pins could not be made", reason="\n".join(lines), hint="\n".join(dict.fromkeys(hints)) or None
    )


def check(wants: Sequence[Want], lock: Lock, platform: str) -> list[str]:
    """What is wrong with `lock`, a line each: pins that are missing, outdated, or that nothing asks for. Offline."""
    pins: dict[tuple[str, str], str] = {}
    pins.update({("source", name): pin.request for name, pin in lock.sources.items()})
    pins.update({("image", name): pin.request for (name, on), pin in lock.images.items() if on == platform})
    pins.update({("crates", name): pin.request for name, pin in lock.crate_sets.items()})
    faults = []
    for want in wants:
        kind = "source" if want.kind.endswith("-source") else want.kind
        request = pins.pop((kind, want.name), None)
        if request is None:
            faults.append(f"{want.place}: {want.kind} {want.name} is not pinned")
        elif request != want.request:
            faults.append(f"{want.place}: {want.kind} {want.name} is pinned for another request")
    faults += [f"lock.toml: {kind} {name} is pinned, but no recipe asks for it" for kind, name in sorted(pins)]
    return faults


def moves(before: Lock, after: Lock) -> list[MovedPin]:
    """What differs between two locks, sorted: sources by version, or by content where that alone has changed; images
    and crate sets file by file."""
    old, new = _versions(before), _versions(after)
    for name in before.sources.keys() & after.sources.keys():
        one, other = before.sources[name], after.sources[name]
        if one.version == other.version and _content(one) != _content(other):
            old[f"source {name}"], new[f"source {name}"] = _content(one), _content(other)
    return [MovedPin(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _content(pin: SourcePin) -> str:
    return f"commit {pin.file.commit}" if isinstance(pin.file, PinnedTree) else f"sha256 {pin.file.sha256}"


def _versions(lock: Lock) -> dict[str, str]:
    found = {f"source {name}": pin.version or _content(pin) for name, pin in lock.sources.items()}
    for (name, platform), image in lock.images.items():
        found.update({f"image {name} ({platform}) {deb.name}:{deb.arch}": deb.version for deb in image.debs})
    for name, pin in lock.crate_sets.items():
        # The version is part of the key: a set may hold two versions of a crate.
        found.update({f"crates {name} {crate.name} {crate.version}": "pinned" for crate in pin.crates})
    return found


def _wanted(wants: Iterable[Want], image: str) -> bool:
    return any(want.kind == "image" and want.name == image for want in wants)


def _crate_url(crate: crates.Crate) -> str:
    return f"mirror://crates/{crate.name}/{crate.version}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8", reason=str(error)) from error


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _debian_arch(platform: str) -> str:
    arch = platform.partition("/")[2]
    if arch not in ("amd64", "arm64"):
        raise RemoteError(f"no Debian architecture is known for build platform {platform}")
    return arch
