#!/bin/sh
# Builds the guest's busybox, static for arm64.
#
# in:  /in/busybox.tar.bz2   busybox's source as published
#      /in/src/              this directory
# out: /out/busybox          the program
#      /out/applets          the names of all its applets but itself, one per line, sorted
#      /out/sbin             those of them that are usually in /sbin
set -eu
export ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-
export KCONFIG_NOTIMESTAMP=1 # no date in the banner: its time zone would be the builder's
fragment=/in/src/busybox.config

tar -xjf /in/busybox.tar.bz2 --no-same-owner
cd busybox-*
# --fuzz=0: it fits this version exactly, or somebody looks at it again.
patch --quiet --fuzz=0 -p1 < /in/src/applets-of-init.patch

# busybox's defconfig takes no fragment, so the fragment's lines replace those of a default .config. oldconfig then
# finds nothing to ask (it would stop at the end of its input) and writes what the dependencies allow.
make -s defconfig > /build/config.log 2>&1
sed -n -e 's/^\(CONFIG_[A-Za-z0-9_]*\)=.*/\1/p' -e 's/^# \(CONFIG_[A-Za-z0-9_]*\) is not set$/\1/p' \
    "$fragment" > /build/requested
grep -v -w -F -f /build/requested .config > /build/others
cat /build/others "$fragment" > .config
make -s oldconfig < /dev/null >> /build/config.log 2>&1 || {
    tail -n 20 /build/config.log
    exit 1
}

# Kconfig drops in silence what it cannot grant. A symbol that is absent counts as "not set".
dropped=0
while read -r symbol; do
    wanted=$(grep -e "^$symbol=" -e "^# $symbol is not set$" "$fragment")
    found=$(grep -e "^$symbol=" .config || echo "# $symbol is not set")
    [ "$wanted" = "$found" ] || {
        echo "busybox.config: wanted: $wanted"
        echo "                 found: $found"
        dropped=1
    }
done < /build/requested
[ $dropped = 0 ] || exit 1

make -j"$VZ_CORES" busybox

gcc -E -DMAKE_LINKS -include include/autoconf.h include/applets.h |
    sed -n 's/^[[:blank:]]*LINK BB_DIR_\([A-Z_]*\) "\{0,1\}\([^"]*\)"\{0,1\}$/\1 \2/p' |
    grep -v ' busybox$' | LC_ALL=C sort -k 2 > /build/links
sed 's/.* //' /build/links > /out/applets
sed -n 's/^SBIN //p' /build/links > /out/sbin
if ! grep -q '^sh$' /out/applets || ! grep -q '^udhcpc$' /out/sbin; then
    echo "the list of applets could not be read from include/applets.h"
    exit 1
fi
cp busybox /out/
