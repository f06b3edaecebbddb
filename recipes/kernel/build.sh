#!/bin/sh
# Builds one kernel profile inside the sandbox.
#
# in:  /in/linux.tar.xz          the kernel's source, any name for its top directory
#      /in/src/                  this recipe's fragment, hardening list and check_config.py
#      /in/requirements.json     capabilities.requirements() of the profile
# out: /out/vmlinux (the raw arm64 Image), config, System.map, capabilities.json, report.json
#
# The configuration is proven before anything is compiled: a request that Kconfig dropped costs seconds, not minutes.
set -eu

requirement() {
    python3 -c 'import json, sys; print(json.load(open("/in/requirements.json"))[sys.argv[1]])' "$1"
}

base=$(requirement base)
fragment=$(requirement fragment)

# All that the kernel would otherwise ask the machine and the clock for. It prints the timestamp with date(1).
export ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-
KBUILD_BUILD_TIMESTAMP=$(date -u -d "@$SOURCE_DATE_EPOCH")
export KBUILD_BUILD_TIMESTAMP KBUILD_BUILD_USER=vzrepro KBUILD_BUILD_HOST=vzrepro KBUILD_BUILD_VERSION=1

# AMD's graphics registers, documentation and tests are a third of the tree's bytes, and no arm64 configuration here
# compiles them; Kconfig files and Makefiles stay.
mkdir linux
tar -xJf /in/linux.tar.xz -C linux --strip-components=1 --no-same-owner --wildcards \
    --exclude='*/drivers/gpu/drm/amd/*.h' --exclude='*/tools/testing/*' \
    --exclude='*/Documentation/*.rst' --exclude='*/Documentation/*.yaml' --exclude='*/Documentation/*.svg'
cd linux

make -s "$base"
# -n: whatever the fragment brings into reach and does not mention is answered "no", as in allnoconfig itself.
case $base in
    allnoconfig) unmentioned=-n ;;
    *) unmentioned= ;;
esac
scripts/kconfig/merge_config.sh $unmentioned .config "/in/src/$fragment" >merge.log 2>&1 || {
    tail -n 20 merge.log
    exit 1
}
make -s olddefconfig
python3 /in/src/check_config.py --config .config --source /in/src --requirements /in/requirements.json --out .

make -j"$VZ_CORES" Image

cp arch/arm64/boot/Image /out/vmlinux
cp .config /out/config
cp System.map capabilities.json /out/
python3 - <<'PYTHON' >/out/report.json
import json
import pathlib
import subprocess

sections = subprocess.run(
    ["aarch64-linux-gnu-size", "vmlinux"], check=True, capture_output=True, text=True
).stdout.splitlines()[1].split()
report = {
    "profile": json.loads(pathlib.Path("/in/requirements.json").read_text())["profile"],
    "release": pathlib.Path("include/config/kernel.release").read_text().strip(),
    "image_bytes": pathlib.Path("/out/vmlinux").stat().st_size,
    "text_bytes": int(sections[0]),
    "data_bytes": int(sections[1]),
    "bss_bytes": int(sections[2]),
    "hardening": json.loads(pathlib.Path("hardening.json").read_text()),
}
print(json.dumps(report, indent=2, sort_keys=True))
PYTHON
