"""`vzrepro bundle …`: check, install, find and pack boot bundles. `ensure --json` is a contract (docs/bundle.md)."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from vzrepro.base.errors import HashMismatch, UsageError, VzreproError
from vzrepro.base.events import Notice
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.cli.verbs import Verbs
from vzrepro.guest import bundle as bundles
from vzrepro.guest import metadata
from vzrepro.guest.bundle import (
    HostSurroundings,
    Installation,
    KernelBundleOptions,
    KernelPaths,
    KernelProfile,
    Resolution,
)
from vzrepro.guest.metadata import OLDEST_HOST, OLDEST_HOST_TEXT, unknown_to

F = TypeVar("F", bound=Callable[..., Any])

_DIRECTORY = click.Path(path_type=Path, file_okay=False)


def _bundle_options(function: F) -> F:
    for option in (
        click.option(
            "--kernel-profile",
            "profile",
            type=click.Choice([profile.value for profile in KernelProfile]),
            help="Which kernel. [default: developer]",
        ),
        click.option("--require", "capabilities", multiple=True, metavar="CAP", help="A capability it must declare."),
        click.option("--install-dir", type=_DIRECTORY, help="Where it is installed. [default: ~/.vz/linux/PROFILE]"),
        click.option("--bundle-dir", type=_DIRECTORY, help="The bundle to take, instead of looking for one."),
        click.option("--any-agent", is_flag=True, help="Accept a guest agent of another version or revision."),
        json_option,
    ):
        function = option(function)
    return function


_host_version = click.option(
    "--host-version", metavar="V", help="Leave out the capabilities that a host of this version does not know."
)


def _check_host(session: Session, version: str | None) -> None:
    """Before anything is built: raises UsageError, and tells of a host that is newer than all that is known."""
    newest = max(since for since in metadata.KNOWN_SINCE.values() if since is not None)
    if version is not None and metadata.host_version(version) > newest:
        known = ".".join(map(str, newest))
        message = (
            f"nothing is known of hosts after {known}: {version} is given what that one knows; "
            "if it knows more, or asks for more, leave out --host-version"
        )
        session.console.report(Notice("info", message))


def _options(
    profile: str | None,
    capabilities: tuple[str, ...],
    install_dir: Path | None,
    bundle_dir: Path | None,
    any_agent: bool,
    host_version: str | None = None,
) -> KernelBundleOptions:
    here = Path.cwd()
    return KernelBundleOptions(
        None if profile is None else KernelProfile(profile),
        frozenset(capabilities),
        None if install_dir is None else here / install_dir,
        None if bundle_dir is None else here / bundle_dir,
        require_exact_agent_version=not any_agent,
        host_version=host_version,
    )


def _surroundings(session: Session) -> HostSurroundings:
    return HostSurroundings(start=session.start.resolve())


def _realize(session: Session) -> Callable[[KernelProfile], Path]:
    def realize(profile: KernelProfile) -> Path:
        [info] = session.realizer().realize([session.target(f"{profile}-bundle")])
        return session.store.location(info.path)

    return realize


def _document(paths: KernelPaths) -> dict[str, Any]:
    return {
        "profile": paths.version.kind,
        "directory": str(paths.directory),
        "kernel": str(paths.kernel),
        "initramfs": str(paths.initramfs),
        "youki": str(paths.youki),
        "version_file": str(paths.version_file),
        "version": dataclasses.asdict(paths.version),
    }


def _print(session: Session, found: Resolution) -> None:
    paths = found.paths
    if found.done is not Installation.PRESENT:
        session.console.report(
            Notice("info", f"{paths.version.kind} bundle ({found.source}) installed: {_DONE[found.done]}")
        )
        unknown = unknown_to(paths.version.capabilities, OLDEST_HOST)
        _tell_hosts(session, unknown, f"vzrepro bundle install --kernel-profile {paths.version.kind}")
    document = {
        **_document(paths),
        "source": found.source,
        "changed": found.done is not Installation.PRESENT,
        "healed": found.done is Installation.HEALED,
    }
    session.console.print_text(str(paths.directory), document)


def _tell_hosts(session: Session, unknown: Collection[str], command: str) -> None:
    if unknown:
        session.console.report(
            Notice(
                "info",
                f"hosts of version {OLDEST_HOST_TEXT} refuse this bundle, since they do not know {', '.join(unknown)}; "
                f"for them: {command} --host-version {OLDEST_HOST_TEXT}",
            )
        )


_DONE = {
    Installation.NEW: "nothing was there",
    Installation.REPLACED: "another one was there",
    Installation.HEALED: "a damaged one was there",
}


@click.group(cls=Verbs)
def bundle() -> None:
    """Check, install, find and pack boot bundles."""


@bundle.command()
@_bundle_options
@_host_version
@click.pass_obj
def install(session: Session, /, **choice: Any) -> None:
    """Install a bundle and print where.

    It is the one that --bundle-dir, the environment or linux/out has, else the workspace's own PROFILE-bundle is
    realized. The developer bundle is put into ~/.vz/linux as well, where older hosts look.
    """
    options, around = _options(**choice), _surroundings(session)
    _check_host(session, options.host_version)
    # A workspace that is not trusted is no matter while nothing is taken from it.
    realize = None if bundles.find_bundle(options, around) or not session.has_workspace() else _realize(session)
    _print(session, bundles.resolve(options, surroundings=around, realize=realize, accept_installed=False))


@bundle.command()
@_bundle_options
@_host_version
@click.option("--realize", is_flag=True, help="Build the workspace's own PROFILE-bundle when no other will do.")
@click.pass_obj
def ensure(session: Session, /, realize: bool, **choice: Any) -> None:
    """Find a bundle, have it installed and whole, and print where it is."""
    options = _options(**choice)
    _check_host(session, options.host_version)
    found = bundles.resolve(
        options,
        surroundings=_surroundings(session),
        realize=_realize(session) if realize else None,
    )
    _print(session, found)


@bundle.command()
@_bundle_options
@click.pass_obj
def verify(session: Session, /, **choice: Any) -> None:
    """Check a bundle's files, checksums, profile, agent, capabilities. Changes nothing.

    It is the one in --bundle-dir, else the one in --install-dir, else all that are installed.
    """
    asked = _options(**choice)
    around = _surroundings(session)
    chosen = [asked]
    if asked.profile is None and asked.bundle_dir is None and asked.install_dir is None:
        every = [dataclasses.replace(asked, profile=profile) for profile in KernelProfile]
        chosen = [options for options in every if bundles.is_installed(options, around)] or [asked]
    for options in chosen:
        found = bundles.verify(options, surroundings=around)
        declared = found.metadata
        text = f"{found.directory}: intact, {declared.profile}, Linux {declared.kernel}, agent {declared.agent}"
        session.console.print_text(text, _document(KernelPaths.of(found.directory, declared)))


@bundle.command("list")
@_bundle_options
@click.pass_obj
def list_bundles(session: Session, /, **choice: Any) -> None:
    """Show every bundle that `ensure` would find, and what is wrong. They come in the order of its search."""
    asked = _options(**choice)
    rows = []
    for profile in KernelProfile if asked.profile is None else [asked.profile]:
        options = dataclasses.replace(asked, profile=profile)
        for place in bundles.places(options, _surroundings(session)):
            if place.source == "installed" and not bundles.has_any(place.directory):
                continue
            state, why, kernel, agent = "intact", None, None, None
            try:
                if place.refused is not None:
                    raise place.refused
                found = bundles.examine(place.directory)
                kernel, agent = found.metadata.kernel, found.metadata.agent
                options.wanted().check(found)
            except VzreproError as error:
                state = "damaged" if isinstance(error, HashMismatch | UsageError) else "unfit"
                state = "untrusted" if error is place.refused else state
                why = error.message
            rows.append((profile.value, place.source, state, kernel, agent, str(place.directory), why))
    if not rows:
        session.console.print_text("there are no bundles; build and install one: vzrepro bundle install")
        return
    session.console.print_table(("profile", "source", "state", "kernel", "agent", "directory", "why"), rows)


@bundle.command()
@click.argument("target", metavar="TARGET|DIR", shell_complete=complete_targets)
@click.option("--version", required=True, metavar="V", help="The version in the archives' names, without v.")
@click.option("--out", type=_DIRECTORY, required=True, help="The directory for the archives; made if missing.")
@_host_version
@json_option
@click.pass_obj
def export(session: Session, target: str, version: str, out: Path, host_version: str | None) -> None:
    """Pack bundles for download, with checksums and attestations. For each vz-linux-PROFILE-vV-arm64.tar.gz, its
    .sha256, and in .intoto.jsonl what is attested.

    TARGET is a bundle's name, `bundles` for all of them, or a directory (with a slash in its name). The developer
    bundle is also written as vz-linux-vV-arm64.tar.gz.
    """
    from vzrepro.proof.attest.statement import files_named

    _check_host(session, host_version)
    directory = Path(target)
    if os.sep not in target and not bundles.has_any(directory):
        [info] = session.realizer().realize([session.target(target)])
        directory = session.store.location(info.path)
    envelopes = _attestations(session, directory)
    made = bundles.export(directory, version, out, envelopes or (), host_version, files_named)
    rows = [
        (
            str(each.path),
            each.profile,
            each.size,
            each.sha256,
            "written" if each.written else "present",
            each.attestations,
        )
        for each in made
    ]
    command = f"vzrepro bundle export {shlex.quote(target)} --version {version} --out DIR"
    _tell_hosts(session, sorted({name for each in made for name in each.unknown}), command)
    if any(each.left_out for each in made):
        message = "no attestations lie beside: they are about the bundle whose version.json declares everything"
        session.console.report(Notice("info", message))
    elif envelopes is None:
        message = f"no attestations were looked for: {directory} is no object of this workspace's store"
        session.console.report(Notice("info", message))
    elif not all(each.attestations for each in made):
        session.warn("there are archives without attestations beside them: nobody has attested these bundles")
    session.console.print_table(("archive", "profile", "bytes", "sha256", "state", "attestations"), rows)


def _attestations(session: Session, directory: Path) -> set[bytes] | None:
    """What is attested of the object in `directory` and of its inputs, among which are the bundles of a set of them;
    None for a directory that is no object of the workspace's store."""
    if not session.has_workspace() or directory.resolve().parent != session.store.root.resolve():
        return None
    node = session.graph.at(directory.resolve().name)
    if node is None:
        return None
    found: set[bytes] = set()
    for drv_hash in (node.drv_hash, *node.drv.inputs.values()):
        found |= session.attestations(drv_hash).keys()
    return found
