"""The maker of one step: downloads, local files, toolchain images and builds become store objects.

It knows the store that its inputs are in, the mirrors and the sandbox; no graph, no plan and no cache. So a run makes
with it what it does not find elsewhere, and an audit makes things again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vzrepro import nar, sandbox
from vzrepro.base import disk, events
from vzrepro.base.config import Config
from vzrepro.base.errors import HashMismatch, Interrupted, TimedOut, UsageError
from vzrepro.base.model import BuildKey, DrvHash, FileHash, ObjectInfo, Outcome, StorePath, store_path
from vzrepro.net import shown
from vzrepro.recipe.graph import Node
from vzrepro.recipe.lock import PinnedFile, PinnedTree
from vzrepro.sources import fetch, image
from vzrepro.store import LocalStore

Inputs = Mapping[DrvHash, StorePath]
"""Where in the store what a node is made from is: of its image, and of each input."""

Keep = Callable[[Path, ObjectInfo], ObjectInfo]
"""Registers a canonical tree that lies in a scratch directory of the store, as `LocalStore.add` does."""


@dataclass(slots=True)
class Maker:
    """Makes objects and gives them to `keep`.

    `snapshot` is the lock's, for public archives. `keep_failed` leaves the sandboxes of failed builds. Setting `stop`
    ends running builds and downloads with Interrupted.
    """

    store: LocalStore
    config: Config
    mirrors: fetch.Mirrors
    snapshot: str | None
    keep: Keep
    report: events.Report = events.ignore
    keep_failed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    _load_lock: threading.Lock = field(default_factory=threading.Lock)

    # --- what needs no inputs

    def take_in(self, node: Node) -> ObjectInfo:
        """Copy local files as they are now; evaluation has hashed them a moment ago. Raises UsageError when they have
        changed since."""
        node.check()
        with self.store.scratch(node.target, stop=self.stop) as scratch:
            tree = scratch / "tree"
            disk.require_distinct(scratch, node.tree)
            for name, content in node.tree.items():
                target = tree / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    target.write_bytes(content)
                elif content.is_symlink():
                    disk.copy_link(content, target)
                else:
                    target.write_bytes(content.read_bytes())
                    target.chmod(0o755 if content.stat().st_mode & 0o100 else 0o644)
                if nar.nar_hash(target)[0].hex != node.drv.content[name].hex:
                    raise UsageError(
                        f"{content if isinstance(content, Path) else name} changed while it was being read",
                        hint="run the command again",
                    )
            return self._register(node, {}, tree, scratch, Outcome.FETCHED)

    def fetch(self, node: Node) -> ObjectInfo:
        """Download a node's files; what an earlier set of the same recipe has of them is taken from there.

        Raises HashMismatch, RemoteError, UsageError.
        """
        node.check()
        self._seed(node)
        if node.checkout is None:
            self.download(node)
        with self.store.scratch(node.target, stop=self.stop) as scratch:
            tree = scratch / "tree"
            self._lay_out(node, tree, self._download_of)
            return self._register(node, {}, tree, scratch, Outcome.FETCHED, origin=node.origin)

    def see_origin(self, node: Node) -> None:
        """See that a node's URLs give the files, or the tree, that it is pinned to. Raises as `download` does."""
        if node.checkout is None:
            self.download(node)
            return
        with self.store.scratch(node.target, stop=self.stop) as scratch:
            self._check_out(node, node.checkout, scratch / "tree")

    def download(self, node: Node) -> None:
        """Have a node's files among the downloads, each seen to be what its URL gives. Raises HashMismatch,
        RemoteError."""
        self._download(node, {self._download_of(file): file for file in node.files.values()}, self._progress(node))

    def _lay_out(self, node: Node, tree: Path, place: Callable[[PinnedFile], Path]) -> None:
        """Write what a node is to the new place `tree`; its files are there, where `place` says."""
        disk.require_distinct(tree.parent, node.files)
        if node.checkout is not None:
            self._check_out(node, node.checkout, tree)
        elif "unpack" in node.drv.env:
            from vzrepro.sources import archive

            file = node.files[""]
            archive.unpack(place(file), tree, shown(file.url), go_on=lambda: self._stop_here(0))
        else:
            if "" not in node.files:
                tree.mkdir()
            for name, file in node.files.items():
                disk.copy_file(place(file), tree / name)

    def _check_out(self, node: Node, pin: PinnedTree, tree: Path) -> None:
        from vzrepro.sources import git

        git.checkout(
            self.mirrors.urls(pin.url),
            pin.commit,
            tree,
            submodules=pin.submodules,
            max_bytes=self.config.download_bytes(),
            report=self._progress(node),
            cancel=self.stop,
        )
        found = nar.nar_hash(tree)[0]
        if found != pin.nar_hash:
            raise HashMismatch(
                f"commit {pin.commit} of {shown(pin.url)} is not the tree that is pinned: wanted {pin.nar_hash.nix}, "
                f"found {found.nix}",
                reason="a commit gives another tree only where a submodule's URL does, or where lock.toml was edited",
                hint=f"if lock.toml is to change: vzrepro lock --update {node.target.removeprefix('source-')}",
            )

    def _progress(self, node: Node) -> Callable[[int, int | None], None]:
        total = sum(file.size for file in node.files.values() if file.size is not None)
        known = all(file.size is not None for file in node.files.values()) and node.checkout is None

        def progress(done: int, found: int | None) -> None:
            self.report(events.Progress(node.target, str(node.path), done, total if known else found))

        return progress

    def _download(
        self, node: Node, files: Mapping[Path, PinnedFile], progress: Callable[[int, int | None], None]
    ) -> None:
        wanted = [
            fetch.Download(
                self.mirrors.urls_of_all((file.url, *file.others), snapshot=self.snapshot),
                place,
                file.sha256,
                file.size,
            )
            for place, file in files.items()
        ]
        try:
            fetch.download_all(wanted, report=progress, max_size=self.config.download_bytes(), cancel=self.stop)
        except HashMismatch as error:
            raise HashMismatch(error.message, reason=error.reason, hint=_mend(node)) from error

    @property
    def _downloads(self) -> Path:
        return self.store.private / "downloads"

    def _download_of(self, file: PinnedFile) -> Path:
        """Where a file waits for its object. Named after URL and hash: what came from elsewhere must not stand in."""
        return self._downloads / file.slot

    def _seed(self, node: Node) -> None:
        """Take files that an earlier set of the same recipe has under the same name, instead of downloading them."""
        if "" in node.files:
            return
        for drv_hash, canonical, _seen in self.store.derivations_named(node.target):
            earlier = json.loads(canonical)
            folder = self.store.location(store_path(drv_hash, earlier["name"]))
            for name, sha256 in earlier["content"].items():
                file = node.files.get(name)
                if file is None or file.sha256.hex != sha256 or not (folder / name).is_file():
                    continue
                target = self._download_of(file)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    disk.copy_file(folder / name, target)

    def adopt(self, node: Node, found: Path) -> ObjectInfo:
        """Register a download or local files that somebody gave: what the derivation pins is taken from `found`, all of
        it hashed, and nothing else, so that it does not matter who gave it. Of an unpacked source that is the archive.

        Raises HashMismatch, UsageError.
        """
        _require_relative(node)
        with self.store.scratch(node.target, stop=self.stop) as scratch:
            tree = scratch / "tree"
            if "git" in node.drv.env:
                _require(node, "", nar.nar_hash(found)[0].hex)
                return self._register(node, {}, found, scratch, Outcome.FETCHED)
            disk.require_distinct(scratch, node.drv.content)
            if "" not in node.drv.content:
                tree.mkdir()
            for name in node.drv.content:
                _take_file(node, name, found, tree / name)
            if "unpack" in node.drv.env:
                from vzrepro.sources import archive

                archive.unpack(tree, scratch / "unpacked", node.path.name, go_on=lambda: self._stop_here(0))
                tree = scratch / "unpacked"
            return self._register(node, {}, tree, scratch, Outcome.FETCHED)

    def clear_downloads(self) -> None:
        """Files are kept during a run, since images share packages; afterwards the store objects hold them.

        Of several runs at once, the last one to end removes them: the others may be in the middle of some.
        """
        if not self.store.is_shared():
            shutil.rmtree(self._downloads, ignore_errors=True)

    # --- what is made from inputs

    def make(self, node: Node, inputs: Inputs, key: BuildKey, urgency: float = 1.0) -> ObjectInfo:
        """Build, or write a toolchain image; `key` is the build key, `urgency` as a `sandbox.Job` has it. Raises
        BuildFailed, TimedOut, UsageError."""
        node.check()
        with self.store.scratch(node.target, stop=self.stop) as scratch:
            if node.drv.builder == "sandbox":
                return self._build(node, inputs, scratch, key, urgency)
            archive = scratch / "archive"
            self._write_image(node, inputs, archive)
            return self._register(node, inputs, archive, scratch, Outcome.BUILT, key=key)

    def make_again(self, node: Node, inputs: Inputs, tree: Path) -> None:
        """Write a toolchain image or download files once more, to the new place `tree`, from nothing that an earlier
        download has left. No object is registered. Raises HashMismatch, RemoteError, UsageError."""
        if node.drv.builder == "image":
            self._write_image(node, inputs, tree)
            return
        if node.checkout is not None or "unpack" in node.drv.env:
            files = {file.slot: file for file in node.files.values()}
            folder = tree.with_name(f"{tree.name}.downloads")
            self._download(node, {folder / name: file for name, file in files.items()}, self._progress(node))
            self._lay_out(node, tree, lambda file: folder / file.slot)
            return
        disk.require_distinct(tree.parent, node.files)
        if "" not in node.files:
            tree.mkdir()
        self._download(node, {tree / name: file for name, file in node.files.items()}, lambda _done, _total: None)

    def _write_image(self, node: Node, inputs: Inputs, archive: Path) -> None:
        debs = self.store.location(inputs[node.drv.inputs["debs"]])
        packages = [(deb.name, deb) for deb in debs.iterdir()]
        platform = node.drv.platform or ""
        image.write_image(packages, archive, platform=platform, env=node.drv.env, stop=self.stop)

    def job(self, node: Node, inputs: Inputs, scratch: Path) -> sandbox.Job:
        """The sandbox job of a node whose inputs are valid; `scratch` is a private directory."""
        drv = node.drv
        log = self.store.log_path(node.path)
        log.parent.mkdir(parents=True, exist_ok=True)
        return sandbox.Job(
            label=node.target,
            image=str(image.image_id(self._image(node, inputs))),
            command=drv.command,
            scratch=scratch,
            log=log,
            source_date_epoch=drv.source_date_epoch or 0,
            cores=self.config.build_cores(),
            env=drv.env,
            inputs={name: self.store.location(inputs[dep]) for name, dep in drv.inputs.items()},
            memory_bytes=self.config.memory_bytes(node.memory_bytes),
            disk_bytes=self.config.disk_bytes(node.disk_bytes),
            timeout_secs=node.timeout_secs,
            platform=drv.platform or "",
            keep_failed=self.keep_failed,
        )

    def load_image(self, node: Node, inputs: Inputs) -> None:
        """Have the node's toolchain image loaded in the container engine."""
        archive = self._image(node, inputs)
        with self._load_lock:
            sandbox.load_image(archive, str(image.image_id(archive)))

    def _image(self, node: Node, inputs: Inputs) -> Path:
        assert node.drv.image is not None
        return self.store.location(inputs[node.drv.image])

    def _build(self, node: Node, inputs: Inputs, scratch: Path, key: BuildKey, urgency: float) -> ObjectInfo:
        if self.keep_failed:
            # Kept from the start: the command that reopens the sandbox names this directory.
            scratch = self.store.keep(scratch)
        job = replace(self.job(node, inputs, scratch / "sandbox"), urgency=urgency)
        job.scratch.mkdir(mode=0o700)
        self.load_image(node, inputs)

        def line(text: str) -> None:
            self.report(events.LogLine(node.target, str(node.path), text))

        try:
            limits = sandbox.run(job, on_line=line, stop=self.stop)
            info = self._register(node, inputs, job.out, scratch, Outcome.BUILT, key=key, progress=limits.check)
        except BaseException:
            if not self.keep_failed:
                self._discard(job)
            raise
        self._discard(job)
        if self.keep_failed:
            disk.remove_tree(scratch)
        return info

    def _discard(self, job: sandbox.Job) -> None:
        # What it had no time for goes with the scratch directory around it, now or at the next run's beginning.
        with contextlib.suppress(Interrupted, TimedOut):
            sandbox.discard(job, stop=self.stop)

    def _stop_here(self, _size: int) -> None:
        if self.stop.is_set():
            raise Interrupted("interrupted")

    def _register(
        self,
        node: Node,
        inputs: Inputs,
        made: Path,
        scratch: Path,
        outcome: Outcome,
        *,
        key: BuildKey | None = None,
        origin: FileHash | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ObjectInfo:
        """Copy what was made into canonical form, hash it, look for references, and have it kept.

        `progress` is called with the bytes read until then, and may raise.
        """
        needles = {path.hash_part: path for path in (*inputs.values(), node.path)}
        tree = scratch / "canonical"
        nar_hash, nar_size, found = nar.canonical_copy(
            made, tree, needles=list(needles), progress=progress or self._stop_here
        )
        info = ObjectInfo(
            path=node.path,
            nar_hash=nar_hash,
            nar_size=nar_size,
            references=tuple(sorted(needles[part] for part in found)),
            drv_hash=node.drv_hash,
            build_key=key,
            origin=origin,
            outcome=outcome,
        )
        return self.keep(tree, info)


def _mend(node: Node) -> str:
    """What to do about a download that is another file than the one pinned."""
    if any(file.size is None for file in node.files.values()):
        return f"{fetch.ELSEWHERE}; or, if the file was meant to change, put the found sha256 into {node.place}"
    # A set of crates follows from a Cargo.lock, and is not updated by its name.
    kind, _, name = node.target.partition("-")
    name = name if kind in ("source", "debs") else ""
    return f"{fetch.ELSEWHERE}; or, if the file was meant to change, run: vzrepro lock --update {name}".rstrip()


def _require_relative(node: Node) -> None:
    """Raise UsageError when a derivation that others wrote names files outside its tree, or below one another."""
    for name in node.drv.content:
        parts = name.split("/")
        above = {"/".join(parts[:number]) for number in range(len(parts))}
        bad = {"", ".", ".."} & set(parts) if name else len(node.drv.content) > 1
        if bad or "\0" in name or (name and above & set(node.drv.content)):
            raise UsageError(f"the derivation of {node.path.base} has {name!r}, which is no name for a file in it")


def _take_file(node: Node, name: str, found: Path, target: Path) -> None:
    """Copy a file that a node pins, or a local link, from below `found`. Raises HashMismatch for any other."""
    source, local = found / name, node.drv.builder == "local"
    target.parent.mkdir(parents=True, exist_ok=True)
    # A link above it would lead elsewhere.
    plain = not any((found / each).is_symlink() for each in source.relative_to(found).parents if name)
    if plain and local and source.is_symlink():
        disk.copy_link(source, target)
    elif plain and not source.is_symlink() and source.is_file():
        disk.copy_file(source, target)
        target.chmod(0o755 if local and source.stat().st_mode & 0o100 else 0o644)
    else:
        raise HashMismatch(f"{node.path.base} was given without {name or 'its file'}")
    if local:
        _require(node, name, nar.nar_hash(target)[0].hex)
        return
    with target.open("rb") as stream:
        _require(node, name, hashlib.file_digest(stream, "sha256").hexdigest())


def _require(node: Node, name: str, found: str) -> None:
    wanted = node.drv.content[name].hex
    if found != wanted:
        raise HashMismatch(
            f"{node.path.base} was given with another {name or 'content'}", reason=f"wanted {wanted}\nfound  {found}"
        )
