"""The command line: parses, calls, and is the only place that ends the process. One module per group of verbs.

A verb's module, and what it needs, is loaded when the verb is called: `_VERBS` tells where it is, and its line of help.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from vzrepro.base.errors import Interrupted, UsageError, VzreproError
from vzrepro.cli.session import Session
from vzrepro.cli.verbs import Card, LazyVerbs
from vzrepro.console import Console

_VERBS = {
    "attest": Card("vzrepro.cli.attest:attest", "Sign what was built here: vzrepro attest TARGET --key FILE."),
    "audit": Card("vzrepro.cli.audit:audit", "Rebuild TARGETS and compare with what the store has."),
    "bundle": Card("vzrepro.cli.bundle:bundle", "Check, install, find and pack boot bundles."),
    "cache": Card("vzrepro.cli.cache:cache", "Share what was built, in a bucket or a directory."),
    "challenge": Card(
        "vzrepro.cli.challenge:challenge", "Compare what builders say they got for TARGET; build nothing."
    ),
    "completion": Card(
        "vzrepro.cli.completion:completion", "Print what makes a shell complete verbs, options and targets."
    ),
    "diff": Card("vzrepro.cli.diff:diff", "Tell where A and B differ, and what probably made them differ."),
    "doctor": Card("vzrepro.cli.doctor:doctor", "Check Docker, QEMU, the disk, workspace, lock and caches."),
    "farm": Card("vzrepro.cli.farm:farm", "Build on other machines, or for others."),
    "graph": Card("vzrepro.cli.inspect:graph", "Draw what TARGET is built from."),
    "init": Card("vzrepro.cli.init:init", "Make a workspace in DIR, with one small artifact."),
    "key": Card("vzrepro.cli.key:key", "Make and show ed25519 keys, in the form that Nix uses too."),
    "lock": Card("vzrepro.cli.lock:lock", "Pin what recipes ask for and lock.toml lacks."),
    "log": Card("vzrepro.cli.inspect:log", "Print the log of TARGET's last build, from here or a cache."),
    "man": Card("vzrepro.cli.man:man", "Print the manual page of all verbs."),
    "oci": Card("vzrepro.cli.oci:oci", "Run containers, each in a guest of its own."),
    "provenance": Card("vzrepro.cli.attest:provenance", "Print TARGET's provenance: of what it was made, and how."),
    "realize": Card("vzrepro.cli.realize:realize", "Make TARGETS valid in the store and print where they are."),
    "sbom": Card("vzrepro.cli.sbom:sbom", "Write TARGET's bill of materials."),
    "shell": Card("vzrepro.cli.realize:shell", "Open a shell in TARGET's sandbox."),
    "show": Card("vzrepro.cli.inspect:show", "Show TARGET's derivation: everything its hash is made of."),
    "store": Card("vzrepro.cli.store:store", "Work on the local store."),
    "targets": Card("vzrepro.cli.inspect:targets", "List what can be realized."),
    "verify": Card("vzrepro.cli.verify:verify_output", "Check that enough builders have signed what is here."),
    "vm": Card("vzrepro.cli.vm:vm", "Boot bundles under QEMU, and use them."),
    "why": Card("vzrepro.cli.inspect:why", "Explain why TARGET would be realized."),
}


def _version(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        from vzrepro.base import version

        ctx.obj.console.print_text(f"vzrepro, version {version.full()}")
        ctx.exit()


@click.group(
    cls=LazyVerbs,
    cards=_VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@click.option("-C", "directory", default=".", metavar="DIR", help="Work in DIR instead of the current directory.")
@click.pass_obj
def group(session: Session, directory: str) -> None:
    """Reproducible builds of what recipes declare, such as Linux boot bundles.

    Exit codes: 0 done, 1 failed, 2 usage, 100 build failed, 101 timed out, 102 hash mismatch, 103 untrusted,
    104 not deterministic, 105 cache or network, 130 interrupted.
    """
    session.start = Path(directory)


def main(words: Sequence[str]) -> None:
    """Run one command; raises SystemExit with its exit code."""
    ours = words[: words.index("--")] if "--" in words else words  # what follows is a guest's command
    console = Console("json" if "--json" in ours else "auto", stdout=sys.stdout, stderr=sys.stderr)
    answer_interrupts()
    try:
        with console:
            code = _run(words, console)
    except VzreproError as error:
        console.show_error(error)
        code = error.exit_code
    sys.exit(code)


def _run(words: Sequence[str], console: Console) -> int:
    session = Session(console)
    try:
        result = group.main(list(words), prog_name="vzrepro", standalone_mode=False, obj=session)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        console.print_text(error.ctx.get_help())
        return UsageError.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "vzrepro"
        raise UsageError(error.format_message(), hint=f"see: {command} --help") from error
    except (KeyboardInterrupt, click.Abort) as error:
        session.interrupt()
        raise Interrupted("interrupted") from error
    except OSError as error:
        raise _explained(error) from error


def _explained(error: OSError) -> VzreproError:
    """What the system refused, for the places that have nothing better to say."""
    what = f"{error.filename}: " if error.filename else ""
    return VzreproError(f"{what}{error.strerror or error}", hint="check the disk and the rights with: vzrepro doctor")


_ENDS = (signal.SIGINT, signal.SIGTERM)

# When an interrupt that came at a bad moment is tried again.
_AGAIN_SECS = 0.01


def answer_interrupts() -> None:
    """Have the first Ctrl-C (or SIGTERM) raise KeyboardInterrupt in the main thread, wherever that is; more of them are
    ignored while containers are being removed."""
    for number in (*_ENDS, signal.SIGALRM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _unraisable


def _interrupt(_number: int, frame: FrameType | None) -> None:
    # logging's lock would stay taken: it is taken before a `try`, and given back, after each fork, by a function that
    # Python calls for itself. What is raised there is shown and forgotten, too.
    for _ in range(10):
        if frame is None:
            break
        if frame.f_globals.get("__name__") == "logging":
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECS)
            return
        frame = frame.f_back
    for number in _ENDS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """An interrupt that met a function which Python calls for itself, such as `__del__`, is raised again."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECS)
    else:
        sys.__unraisablehook__(what)
