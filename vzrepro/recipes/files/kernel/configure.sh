#!/bin/sh
# Configures one kernel profile inside the sandbox, and proves the result against what was asked.
#
# in:  /in/linux.tar.xz          the kernel's source, any name for its top directory
#      /in/src/                  this recipe's fragment, lists and check_config.py
#      /in/requirements.json     capabilities.requirements() of the profile
# out: /out/config (the final .config), capabilities.json (the proven ones)
#
# Apart from the compilation: a request that Kconfig dropped costs seconds, and a changed comment, reason or list that
# gives the same configuration compiles nothing again.
set -eu

requirement() {
    python3 -c 'import json, sys; print(json.load(open("/in/requirements.json"))[sys.argv[1]])' "$1"
}

base=$(requirement base)
fragment=$(requirement fragment)
export ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-

# Only what Kconfig reads, and what it compiles to try the compiler.
mkdir linux
tar -xJf /in/linux.tar.xz -C linux --strip-components=1 --no-same-owner --wildcards \
    --exclude='*/drivers/*.[chS]' --exclude='*/sound/*.[chS]' --exclude='*/fs/*.[chS]' --exclude='*/net/*.[chS]' \
    --exclude='*/tools/testing/*' --exclude='*/Documentation/*.rst' --exclude='*/Documentation/*.yaml'
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
python3 /in/src/check_config.py --config .config --source /in/src --requirements /in/requirements.json --out /out
cp .config /out/config
