#!/bin/sh
# Makes the disks that a probed guest gets, an ext4 and a btrfs, empty, the same bytes each time.
#
# in:  /in/pinned/pinned.so (pinned.c)      out: /out/ext4.img, /out/btrfs.img
set -eu

truncate -s 16M /out/ext4.img
mke2fs -q -t ext4 -m 0 -U 76a00000-0000-4000-8000-000000000001 \
    -E hash_seed=76a00000-0000-4000-8000-000000000002,root_owner=0:0 /out/ext4.img

truncate -s 48M /out/btrfs.img
LD_PRELOAD=/in/pinned/pinned.so mkfs.btrfs -q -m single -d single -U 76a00000-0000-4000-8000-000000000003 /out/btrfs.img
