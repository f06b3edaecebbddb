"""The emulator that guests run under sees code that changes behind its back: see `docs/guest.md`, QEMU before 8.2."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

from tests.guests import LIMIT_SECS, needs_qemu
from vzrepro.guest.vm import boot, qemu

pytestmark = needs_qemu

PAGE, LINE = 4096, 64

PAGES = 256


def program(seed: int) -> bytes:
    """A static arm64 program that adds numbers of its own in short blocks, one in the middle of each cache line, jumps
    from one to the next, and ends with 0 when the sum is right."""
    chosen = random.Random(seed)
    base, code_at = 0x400000, PAGE
    lines = PAGES * PAGE // LINE
    code = bytearray(struct.pack("<I", 0xD503201F) * (PAGES * PAGE // 4))  # nop
    put = lambda at, *words: struct.pack_into(f"<{len(words)}I", code, at, *words)  # noqa: E731
    put(0, 0xD2800000, 0x14000000 | (LINE + 16 - 4) // 4)  # mov x0, #0; b to the first block
    total = 0
    for line in range(1, lines - 1):
        number = chosen.randrange(1, 4096)
        total += number
        put(line * LINE + 16, 0x91000000 | number << 10, 0x14000000 | (LINE - 4) // 4)  # add x0, x0, #number; b
    put(
        (lines - 1) * LINE + 16,
        0xD2800001 | (total & 0xFFFF) << 5,  # mov x1, #low
        0xF2A00001 | (total >> 16) << 5,  # movk x1, #high, lsl #16
        0xEB01001F,  # cmp x0, x1
        0x1A9F07E0,  # cset w0, ne
        0xD2800BA8,  # mov x8, #93: exit
        0xD4000001,  # svc #0
    )
    head = b"\x7fELF\2\1\1" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, base + code_at, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 5, code_at, base + code_at, base + code_at, len(code), len(code), PAGE)
    return head.ljust(code_at, b"\0") + code


def test_programs_of_a_share_are_run_as_they_are(bundle: Path, programs: boot.HostPrograms, tmp_path: Path) -> None:
    """With little memory, so that the pages of one become the next one's."""
    for number in range(4):
        (tmp_path / str(number)).write_bytes(program(number))
        (tmp_path / str(number)).chmod(0o755)
    guest = boot.of_bundle(bundle)
    guest = replace(guest, memory_mib=96, shares=(qemu.Share("vz-mount-0", tmp_path),))
    script = "for n in 0 1 2 3 0 1 2 3; do /mnt/vz-mount-0/$n || echo wrong; echo 3 > /proc/sys/vm/drop_caches; done"
    with boot.running(guest, programs=programs, timeout_secs=LIMIT_SECS) as vm:
        with vm.agent.exec("/bin/sh", ["-c", script], timeout_secs=LIMIT_SECS) as execution:
            ended = execution.finish()
        assert (ended.code, ended.stdout) == (0, b"")
        vm.power_off()
