"""`vzrepro vm bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vzrepro.base import words
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Notice
from vzrepro.cli.options import host_loopback_option, json_option
from vzrepro.cli.session import Session
from vzrepro.cli.vm import machine

if TYPE_CHECKING:
    from vzrepro.guest.vm.bench import BenchReport

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--bundle-dir", "bundle", metavar="BUNDLE|TARGET", default="container-bundle", show_default=True)
@click.option("--compare", "other", metavar="BUNDLE|TARGET", help="Boot this one as well, in turns; give the ratio.")
@click.option("--iterations", type=click.IntRange(min=1), default=10, show_default=True, help="Boots of each bundle.")
@click.option("--timeout-secs", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True)
@click.option("--rootfs-dir", type=_DIRECTORY, help="Boot with this root file system, shared and overlaid.")
@click.option("--http-smoke-url", metavar="URL", help="Have each guest fetch this.")
@host_loopback_option
@click.option("--kernel", type=_FILE, help="Boot this kernel with the initramfs of --bundle-dir.")
@click.option("--guest-logs", is_flag=True, help="Show the end of each guest's kernel log (dmesg | tail -n 120).")
@click.option("--guest-log-command", metavar="C", help="Show what this shell command prints in each guest.")
@click.option(
    "--serial-log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the console of each boot there, made if need be: ITERATION-LABEL.log.",
)
@click.option(
    "--retry-log-every",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="N",
    help="Say every N seconds that a guest is still awaited; 0 never does.",
)
@click.option("--html", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Draw a page of it.")
@json_option
@click.pass_obj
def bench(
    session: Session,
    bundle: str,
    other: str | None,
    iterations: int,
    timeout_secs: float,
    rootfs_dir: Path | None,
    http_smoke_url: str | None,
    host_loopback: bool,
    kernel: Path | None,
    guest_logs: bool,
    guest_log_command: str | None,
    serial_log_dir: Path | None,
    retry_log_every: float,
    html: Path | None,
) -> None:
    """Boot a bundle again and again; show how long each phase takes. Exits with 1 when a boot failed."""
    from vzrepro.guest.vm import bench as benches  # gRPC and pydantic take a while to load
    from vzrepro.guest.vm import boot, qemu
    from vzrepro.guest.vm.bench_page import page

    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"{html} cannot be written", reason=f"there is no directory {html.parent}")
    if serial_log_dir is not None:
        try:
            serial_log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{serial_log_dir} cannot be made", reason=error.strerror) from error
    names = [bundle] if other is None else [bundle, other]
    folders, programs = machine.prepare(session, names, shares=rootfs_dir is not None)
    shares = () if rootfs_dir is None else (qemu.Share("rootfs", rootfs_dir.resolve(), read_only=True),)
    guests = [
        (name, replace(boot.of_bundle(place), shares=shares, host_loopback=host_loopback))
        for name, place in zip(names, folders, strict=True)
    ]
    if kernel is not None:
        guests[0] = (f"{bundle} with {kernel}", replace(guests[0][1], kernel=kernel.resolve()))
    report = benches.measure(
        guests,
        programs,
        benches.Options(
            iterations=iterations,
            timeout_secs=timeout_secs,
            kernel_logs=guest_logs,
            log_command=guest_log_command,
            smoke_url=http_smoke_url,
            console_directory=serial_log_dir,
            waiting_every_secs=retry_log_every,
        ),
        session.console.report,
    )
    if html is not None:
        html.write_text(page(report), encoding="utf-8")
        session.console.report(Notice("info", f"the page: {html.absolute().as_uri()}"))
    session.console.print_text(_table(report), report.model_dump(mode="json"))
    if report.failures():
        raise VzreproError(
            f"{report.failures()} of {words.plural(len(report.boots), 'boot')} failed",
            reason=next(one.error for one in report.boots if one.error is not None),
            hint="more of the guest: --serial-log-dir, --guest-logs; more time: --timeout-secs",
        )


def _table(report: BenchReport) -> str:
    lines = [f"{'':8} {'':3} {'boots':>6} {'min':>8} {'mean':>8} {'median':>8} {'p95':>8} {'max':>8}  (seconds)"]
    phases = dict.fromkeys(phase for subject in report.bundles for phase in subject.phases)
    for phase in phases:
        for subject in report.bundles:
            if (found := subject.phases.get(phase)) is not None:
                label = subject.label if report.comparison is not None else ""
                values = (found.min, found.mean, found.median, found.p95, found.max)
                lines.append(f"{phase:8} {label:3} {found.count:6} " + " ".join(f"{value:8.3f}" for value in values))
    if report.comparison is not None:
        lines.append("\nb/a, of the medians, with a 95 % confidence interval:")
        for phase, compared in report.comparison.items():
            if compared.ratio is not None:
                lines.append(f"{phase:12} {compared.ratio:7.3f}  [{compared.low:.3f}, {compared.high:.3f}]")
    for subject in report.bundles:
        size = f"kernel {subject.kernel_bytes:,} bytes, initramfs {subject.initramfs_bytes:,}"
        lines.append(f"{subject.label}: {subject.name}: {size}")
    return "\n".join(lines)
