"""`vzrepro vm bench`, as a user runs it: real guests, the report, the page, and boots that fail."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli
from tests.guests import needs_qemu
from vzrepro.guest.vm.bench import PHASES, BenchReport

pytestmark = needs_qemu


def _report(stdout: str) -> BenchReport:
    return BenchReport.model_validate_json(stdout.splitlines()[-1])


def test_two_bundles_take_turns_and_are_compared(project: Cli, bundle: Path, tmp_path: Path) -> None:
    """The first with another kernel: its own, made longer."""
    html, consoles, kernel = tmp_path / "bench.html", tmp_path / "new/consoles", tmp_path / "Image"
    own = (bundle / "vmlinux").read_bytes()
    kernel.write_bytes(own + bytes(4096))
    words = ["--bundle-dir", "container-bundle", "--compare", "container-bundle", "--iterations", "2"]
    words += ["--kernel", str(kernel), "--serial-log-dir", str(consoles)]
    done = project.run("vm", "bench", *words, "--html", str(html), "--json")
    report = _report(done.stdout)
    assert [boot.bundle for boot in report.boots] == ["a", "b", "b", "a"]
    assert [subject.failed for subject in report.bundles] == [0, 0]
    for subject in report.bundles:
        assert list(subject.phases) == list(PHASES)
        assert subject.phases["total"].median >= subject.phases["kernel"].median > 0
    assert report.comparison is not None
    assert [subject.kernel_bytes for subject in report.bundles] == [len(own) + 4096, len(own)]
    assert [subject.name for subject in report.bundles] == [f"container-bundle with {kernel}", "container-bundle"]
    kept = sorted(path.name for path in consoles.iterdir())
    assert kept == ["0001-a.log", "0001-b.log", "0002-a.log", "0002-b.log"]
    for name in kept:
        assert "vz-init: agent start" in (consoles / name).read_text()
    assert report.model_dump_json(indent=1).replace("</", "<\\/") in html.read_text(encoding="utf-8")


def test_a_boot_that_fails_is_counted_and_told(project: Cli) -> None:
    done = project.run("vm", "bench", "--iterations", "2", "--timeout-secs", "0.05", "--json", code=1)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    [report] = [BenchReport.model_validate(line) for line in lines if "boots" in line]
    assert report.failures() == 2
    assert report.bundles[0].phases == {}
    assert lines[-1]["message"] == "2 of 2 boots failed"
    assert "waited for" in lines[-1]["reason"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, list[str]]]:
    """A web server on the loopback: its port, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/good" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()


def test_each_guest_fetches_the_smoke_url_and_its_logs_are_shown(project: Cli, served: tuple[int, list[str]]) -> None:
    port, asked = served
    words = ["--iterations", "1", "--guest-logs", "--guest-log-command", "echo from-the-guest; exit 7"]
    done = project.run(
        "vm", "bench", *words, "--host-loopback", "--http-smoke-url", f"http://10.0.2.2:{port}/good", "--json"
    )
    assert asked == ["/good"]
    report = _report(done.stdout)
    assert report.bundles[0].phases["http"].count == 1
    notices = [json.loads(line).get("message", "") for line in done.stdout.splitlines()]
    assert "guest 1> from-the-guest" in notices
    assert "boot 1: the guest log command ended with exit code 7" in notices, "told, and the boot counts"
    kernel = [message for message in notices if re.match(r"guest 1> (?:<\d+>)?\[ *\d+\.\d+\] ", message)]
    assert 20 < len(kernel) <= 120

    words = ["--iterations", "1", "--guest-log-command", "echo seen anyway"]
    done = project.run(
        "vm", "bench", *words, "--host-loopback", "--http-smoke-url", f"http://10.0.2.2:{port}/bad", code=1
    )
    assert asked == ["/good", "/bad"]
    assert "wget" in done.stderr and "404" in done.stderr
    assert "guest 1> seen anyway" in done.stderr


def test_a_page_that_cannot_be_written_is_refused_before_a_boot(project: Cli, tmp_path: Path) -> None:
    done = project.run("vm", "bench", "--html", str(tmp_path / "none" / "page.html"), code=2)
    assert "there is no directory" in done.stderr
    assert "boot 1" not in done.stderr


@pytest.mark.parametrize("tools", [(), ("curl",), ("curl", "wget")], ids=["busybox", "curl", "wget"])
def test_the_smoke_url_is_fetched_by_what_the_image_has(
    project: Cli, tmp_path: Path, served: tuple[int, list[str]], tools: tuple[str, ...]
) -> None:
    """An image without any program, not even a shell; and images with wget and curl, which fetch and say so."""
    port, asked = served
    rootfs = tmp_path / "rootfs"
    (rootfs / "etc").mkdir(parents=True)
    (rootfs / "etc/word").write_text("of the host\n")
    if tools:
        [busybox] = project.realize("busybox")
        (rootfs / "bin").mkdir()
        shutil.copy(busybox / "busybox", rootfs / "bin")
        (rootfs / "bin/sh").symlink_to("busybox")
    for tool in tools:
        program = rootfs / "bin" / tool
        program.write_text(
            f'#!/bin/busybox sh\nfor url; do :; done\nbusybox wget -O /dev/null "$url"; echo {tool} > /etc/word\n'
        )
        program.chmod(0o755)
    script = 'read -r word < /etc/word; echo "$word"; echo > /etc/word'
    words = ["--iterations", "1", "--rootfs-dir", str(rootfs), "--guest-log-command", script]
    done = project.run("vm", "bench", *words, "--host-loopback", "--http-smoke-url", f"http://10.0.2.2:{port}/good")
    assert asked == ["/good"]
    assert f"guest 1> {tools[-1] if tools else 'of the host'}" in done.stderr
    assert (rootfs / "etc/word").read_text() == "of the host\n"
