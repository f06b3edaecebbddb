#!/bin/sh
# Compiles one kernel profile inside the sandbox.
#
# in:  /in/linux.tar.xz          the kernel's source, any name for its top directory
#      /in/config/config         what configure.sh proved
#      /in/patches/              when the profile has any: *.patch, applied with -p1
# out: /out/vmlinux (the raw arm64 Image), config, System.map, report.json
set -eu

# All that the kernel would otherwise ask the machine and the clock for. It prints the timestamp with date(1), whose
# form is the locale's.
export ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-
KBUILD_BUILD_TIMESTAMP=$(LC_ALL=C date -u -d "@$SOURCE_DATE_EPOCH")
export KBUILD_BUILD_TIMESTAMP KBUILD_BUILD_USER=vzrepro KBUILD_BUILD_HOST=vzrepro KBUILD_BUILD_VERSION=1

# AMD's graphics registers, documentation and tests are a third of the tree's bytes, and no arm64 configuration here
# compiles them; Kconfig files and Makefiles stay.
mkdir linux
tar -xJf /in/linux.tar.xz -C linux --strip-components=1 --no-same-owner --wildcards \
    --exclude='*/drivers/gpu/drm/amd/*.h' --exclude='*/tools/testing/*' \
    --exclude='*/Documentation/*.rst' --exclude='*/Documentation/*.yaml' --exclude='*/Documentation/*.svg'
cd linux

for file in /in/patches/*.patch; do
    # --fuzz=0: a patch fits this version of the kernel exactly, or somebody looks at it again.
    [ ! -e "$file" ] || patch --quiet --fuzz=0 -p1 <"$file"
done

cp /in/config/config .config
make -s olddefconfig
# What was proven is what is compiled.
cmp .config /in/config/config

make -j"$VZ_CORES" Image

cp arch/arm64/boot/Image /out/vmlinux
cp .config /out/config
cp System.map /out/
python3 - <<'PYTHON' >/out/report.json
import json
import pathlib
import subprocess


def sections(*arguments: str) -> list[int]:
    """Bytes of text, data and bss, as the last line of size(1) says."""
    done = subprocess.run(["aarch64-linux-gnu-size", *arguments], check=True, capture_output=True, text=True)
    return [int(number) for number in done.stdout.splitlines()[-1].split()[:3]]


text, data, bss = sections("vmlinux")
archives = sorted([*pathlib.Path().glob("*/built-in.a"), *pathlib.Path().glob("*/*/built-in.a")])
report = {
    "release": pathlib.Path("include/config/kernel.release").read_text().strip(),
    "image_bytes": pathlib.Path("/out/vmlinux").stat().st_size,
    "text_bytes": text,
    "data_bytes": data,
    "bss_bytes": bss,
    # Code, constants and data of each directory's objects: where the bytes of the image come from.
    "directory_bytes": {str(path.parent): sum(sections("-t", str(path))[:2]) for path in archives},
}
print(json.dumps(report, indent=2, sort_keys=True))
PYTHON
