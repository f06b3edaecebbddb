#!/bin/sh
# Builds the guest's busybox, static for arm64.
#
# /in/busybox.tar.bz2   busybox sources as published
# /in/src               this directory
# /in/check_config.py   recipes/kernel/check_config.py: proves a final .config against its fragment
# /out/busybox          the program
# /out/applets          one link path per line (/bin/cat …), sorted: what the initramfs links to it
set -eu
export KCONFIG_NOTIMESTAMP=1 # else the banner carries a date

# Python's tarfile reads bzip2 itself: one tool less in the toolchain.
python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall("source", filter="data")' /in/busybox.tar.bz2
cd source/busybox-*

bb_make() { make ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu- CC="$cross_cc" HOSTCC="$host_cc" "$@"; }
cross_cc=$(command -v aarch64-linux-gnu-gcc || command -v aarch64-linux-gnu-gcc-14)
host_cc=$(command -v gcc || command -v gcc-14)

KCONFIG_ALLCONFIG=/in/src/busybox.config bb_make -s allnoconfig > /build/config.log 2>&1 || {
    cat /build/config.log
    exit 1
}
mkdir /build/check
cp /in/src/busybox.config /build/check/
: > /build/check/no-hardening
printf '%s' '{"profile": "busybox", "fragment": "busybox.config", "hardening": "no-hardening", "forbidden": [], "capabilities": {}}' \
    > /build/check/requirements.json
python3 /in/check_config.py --config .config --source /build/check \
    --requirements /build/check/requirements.json --out /build/check

bb_make -j"${VZ_CORES:-1}" busybox

"$host_cc" -E -DMAKE_LINKS -include include/autoconf.h include/applets.h |
    sed -n -e '/"busybox"/d' -e 's/^[[:blank:]]*LINK BB_DIR_\([A-Z_]*\) "\(.*\)"$/\1 \2/p' |
    while read -r where name; do
        case $where in
            ROOT) echo "/$name" ;;
            *) echo "/$(printf %s "$where" | tr 'A-Z_' 'a-z/')/$name" ;;
        esac
    done | sort > /build/applets
[ "$(grep -c . /build/applets)" -gt 50 ] || {
    echo "busybox: its list of applets could not be read from include/applets.h"
    exit 1
}
install -m 555 busybox /out/busybox
install -m 444 /build/applets /out/applets
