"""`vzrepro vm bench`, as a user runs it: real guests, the report, the page, and boots that fail."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli
from vzrepro.vm.bench import PHASES, Report

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="QEMU for arm64 is not installed")


def _report(stdout: str) -> Report:
    return Report.model_validate_json(stdout.splitlines()[-1])


def test_two_bundles_take_turns_and_are_compared(project: Cli, tmp_path: Path) -> None:
    html = tmp_path / "bench.html"
    words = ["--bundle-dir", "container-bundle", "--compare", "container-bundle", "--iterations", "2"]
    done = project.run("vm", "bench", *words, "--html", str(html), "--json")
    report = _report(done.stdout)
    assert [boot.bundle for boot in report.boots] == ["a", "b", "b", "a"]
    assert [subject.failed for subject in report.bundles] == [0, 0]
    for subject in report.bundles:
        assert list(subject.phases) == list(PHASES)
        assert subject.phases["total"].median >= subject.phases["kernel"].median > 0
    assert report.comparison is not None
    assert report.comparison["image_bytes"].ratio == 1
    assert report.model_dump_json(indent=1).replace("</", "<\\/") in html.read_text(encoding="utf-8")


def test_a_boot_that_fails_is_counted_and_told(project: Cli) -> None:
    done = project.run("vm", "bench", "--iterations", "2", "--timeout-secs", "0.05", "--json", code=1)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    [report] = [Report.model_validate(line) for line in lines if "boots" in line]
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
    words = ["--iterations", "1", "--guest-logs", "--guest-log-command", "echo from-the-guest", "--http-smoke-url"]
    done = project.run("vm", "bench", *words, f"http://10.0.2.2:{port}/good", "--json")
    assert asked == ["/good"]
    assert _report(done.stdout).bundles[0].phases["http"].count == 1
    notices = [json.loads(line).get("message", "") for line in done.stdout.splitlines()]
    assert "guest 1> from-the-guest" in notices
    assert any("guest 1> vz-init: start" in message for message in notices)

    done = project.run("vm", "bench", "--iterations", "1", "--http-smoke-url", f"http://10.0.2.2:{port}/bad", code=1)
    assert asked == ["/good", "/bad"]
    assert "wget" in done.stderr and "404" in done.stderr


def test_a_page_that_cannot_be_written_is_refused_before_a_boot(project: Cli, tmp_path: Path) -> None:
    done = project.run("vm", "bench", "--html", str(tmp_path / "none" / "page.html"), code=2)
    assert "there is no directory" in done.stderr
    assert "boot 1" not in done.stderr


def test_guests_boot_with_a_root_file_system_of_the_host(project: Cli, tmp_path: Path) -> None:
    [busybox] = project.realize("busybox")
    rootfs = tmp_path / "rootfs"
    (rootfs / "bin").mkdir(parents=True)
    shutil.copy(busybox / "busybox", rootfs / "bin")
    for name in ("sh", "true", "cat"):
        (rootfs / "bin" / name).symlink_to("busybox")
    (rootfs / "word").write_text("of the host\n")
    words = ["--iterations", "1", "--rootfs-dir", str(rootfs), "--guest-log-command", "cat /word; echo guest > /word"]
    done = project.run("vm", "bench", *words)
    assert "guest 1> of the host" in done.stderr
    assert (rootfs / "word").read_text() == "of the host\n"
