"""`bench/kernel`: its figures of a report, and what it calls worse."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPT = Path(__file__).parents[2] / "bench" / "kernel"


def load() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("bench_kernel", str(SCRIPT))
    spec = importlib.util.spec_from_loader("bench_kernel", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


bench = load()


def boot(label: str, kernel: float) -> dict[str, Any]:
    return {"bundle": label, "durations": {"kernel": kernel, "init": 0.1, "agent": 0.2, "exec": 0.3, "total": 9.0}}


def test_figures_are_ratios_to_the_plain_kernel() -> None:
    report = {
        "host": "a machine",
        "iterations": 3,
        "bundles": [{"kernel_bytes": 2_000}, {"kernel_bytes": 1_000}],
        "boots": [boot("a", 2.0), boot("b", 0.7), boot("b", 9.0), boot("a", 2.0), boot("a", 1.0), boot("b", 0.7)],
    }
    figures = bench.figures(report)
    assert figures["bytes_per_plain_bytes"] == 0.5
    assert (figures["plain_init_secs"], figures["init_secs"], figures["ready_secs"]) == (2.0, 0.7, 1.0)
    assert (figures["init_per_plain_init"], figures["ready_per_plain_init"]) == (0.35, 0.5)


def test_two_per_cent_of_size_and_ten_of_time() -> None:
    record = {"image_bytes": 1_000_000, "ready_per_plain_init": 0.5}
    assert bench.compare({"image_bytes": 1_019_000, "ready_per_plain_init": 0.549}, record) == []
    assert bench.compare({"image_bytes": 1_021_000, "ready_per_plain_init": 0.551}, record) == [
        "image_bytes is 1021000, the record 1000000",
        "ready_per_plain_init is 0.551, the record 0.5",
    ]
