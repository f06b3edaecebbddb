"""What makes outputs differ, and what to do about each cause."""

from __future__ import annotations

from collections.abc import Mapping

FIXES: Mapping[str, str] = {
    "timestamp": "take the time from $SOURCE_DATE_EPOCH: date -u -d @$SOURCE_DATE_EPOCH, gzip -n, "
    "tar --mtime=@$SOURCE_DATE_EPOCH, KBUILD_BUILD_TIMESTAMP; write an initramfs with vzrepro.recipes.initramfs",
    "path": "map the build's directory away: -ffile-prefix-map=$PWD=. (C), --remap-path-prefix=$PWD=. (Rust); "
    "write no absolute path into an output",
    "order": "sort whatever comes from a directory or a hash table: find … | LC_ALL=C sort, tar --sort=name, "
    "$(sort $(wildcard …)) in a makefile, sorted(os.listdir(…))",
    "random": "have no chance in it: a fixed seed (-frandom-seed=NAME, PYTHONHASHSEED=0), a fixed UUID "
    "(mkfs -U, veritysetup --uuid), no mktemp name in an output",
    "user": "write no user: tar --owner=0 --group=0 --numeric-owner, cpio -R 0:0, KBUILD_BUILD_USER=vz, "
    "no id or whoami",
    "parallelism": "write results in a fixed order whichever ends first, and no count of jobs; where that cannot be, "
    "make this one step with -j1",
    "host": "write no name of the machine: KBUILD_BUILD_HOST=vz, no hostname or uname",
    "locale": "set LC_ALL=C for the command whose words or order these are",
    "build-id": "link with -Wl,--build-id=none; a build id differs because something else that was linked does, "
    "so look for that first (it may have been stripped)",
    "process-id": "write no process id: no $$ or getpid() in names and contents",
    "inode": "write no inode numbers: cpio --reproducible or vzrepro.recipes.initramfs; no stat -c %i",
    "umask": "set modes outright: install -m 0644, chmod, tar --mode=go=rX,u+rw,a-s",
    "environment": "write no environment: unset what is not needed, and print no env or set into an output",
    "compression": "name level and threads: gzip -n -9, xz -T1 -6, zstd -T1 -19; both sides need the same compressor",
    "unknown": "vzrepro audit TARGET tells which axis changes it",
}
"""Cause → what to do about it in a recipe."""
