"""The command line: parses, calls, and is the only place that ends the process. One module per group of verbs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

import vzrepro
from vzrepro.cli import (
    attest,
    audit,
    bundle,
    cache,
    challenge,
    diff,
    doctor,
    inspect,
    key,
    lock,
    oci,
    realize,
    sbom,
    store,
    verify,
    vm,
)
from vzrepro.cli.session import Session
from vzrepro.console import Console
from vzrepro.errors import Interrupted, UsageError, VzreproError
from vzrepro.wire import Stop


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(vzrepro.__version__, prog_name="vzrepro")
@click.option("-C", "directory", default=".", metavar="DIR", help="Work in DIR instead of the current directory.")
@click.pass_context
def group(context: click.Context, directory: str) -> None:
    """Reproducible builds of Linux boot bundles.

    Exit codes: 0 done, 1 failed, 2 usage, 100 build failed, 101 timed out, 102 hash mismatch, 103 untrusted,
    104 not deterministic, 105 cache or network, 130 interrupted.
    """
    console, stop = context.obj
    context.obj = Session(console, stop, Path(directory))


group.add_command(realize.realize)
group.add_command(lock.lock)
group.add_command(store.store)
group.add_command(cache.cache)
group.add_command(key.key)
group.add_command(bundle.bundle)
group.add_command(vm.vm)
group.add_command(oci.oci)
group.add_command(diff.diff)
group.add_command(doctor.doctor)
group.add_command(audit.audit)
group.add_command(sbom.sbom)
group.add_command(attest.attest)
group.add_command(attest.provenance)
group.add_command(verify.verify_output)
group.add_command(challenge.challenge)
for verb in (inspect.targets, inspect.show, inspect.why, inspect.graph, inspect.log, realize.shell):
    group.add_command(verb)


def main(words: Sequence[str]) -> None:
    """Run one command and end the process with its exit code."""
    ours = words[: words.index("--")] if "--" in words else words  # what follows is a guest's command
    console = Console("json" if "--json" in ours else "auto", stdout=sys.stdout, stderr=sys.stderr)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with console:
            code = _run(words, console)
    except VzreproError as error:
        console.show_error(error)
        code = error.exit_code
    sys.exit(code)


def _run(words: Sequence[str], console: Console) -> int:
    stop = Stop()
    try:
        result = group.main(list(words), prog_name="vzrepro", standalone_mode=False, obj=(console, stop))
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        console.print_text(error.ctx.get_help())
        return UsageError.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "vzrepro"
        raise UsageError(error.format_message(), hint=f"see: {command} --help") from error
    except (KeyboardInterrupt, click.Abort) as error:
        stop.set()
        raise Interrupted("interrupted") from error
    except OSError as error:
        raise _explained(error) from error


def _explained(error: OSError) -> VzreproError:
    """What the system refused, for the places that have nothing better to say."""
    what = f"{error.filename}: " if error.filename else ""
    return VzreproError(f"{what}{error.strerror or error}", hint="check the disk and the rights with: vzrepro doctor")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """The first Ctrl-C (or SIGTERM) ends the work; more of them are ignored while containers are being removed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
