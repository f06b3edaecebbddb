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

tar xf /in/busybox.tar.bz2
cd busybox-*

bb_make() { make ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu- CC="$cross_cc" HOSTCC="$host_cc" "$@"; }
cross_cc=$(command -v aarch64-linux-gnu-gcc || command -v aarch64-linux-gnu-gcc-14)
host_cc=$(command -v gcc || command -v gcc-14)

# busybox's allnoconfig takes no fragment, so the fragment's lines replace those of an all-no .config. oldconfig finds
# nothing left to ask (it would stop at the end of its input) and writes what the dependencies allow.
bb_make -s allnoconfig > /build/config.log 2>&1
sed -n -e 's/^\(CONFIG_[A-Za-z0-9_]*\)=.*/\1/p' -e 's/^# \(CONFIG_[A-Za-z0-9_]*\) is not set$/\1/p' \
    /in/src/busybox.config > /build/requested
grep -v -w -F -f /build/requested .config > /build/others
cat /build/others /in/src/busybox.config > .config
bb_make -s oldconfig < /dev/null >> /build/config.log 2>&1 || {
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
