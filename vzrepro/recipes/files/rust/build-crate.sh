#!/bin/sh
# Builds one Rust program, static against glibc, from its own lock and vendored crates. Output: /out/$VZ_BIN.
#
# Inputs:  /in/rust     this directory
#          /in/crates   <name>-<version>.crate, exactly those the build reaches
#          /in/source   the program: a published .crate file, or a directory with Cargo.toml and Cargo.lock
# Env:     VZ_BIN         name of the binary
#          VZ_TARGET      aarch64-unknown-linux-gnu or x86_64-unknown-linux-gnu
#          VZ_CARGO_ARGS  further words for cargo build, e.g. "--no-default-features --features v2" (optional)
# Whatever else the recipe puts into the environment (CARGO_PROFILE_RELEASE_…, LIBSECCOMP_…) cargo and the build
# scripts see as it is.
set -eu

root=$PWD
case $VZ_TARGET in
aarch64-unknown-linux-gnu) linker=aarch64-linux-gnu-gcc ;;
x86_64-unknown-linux-gnu) linker=gcc ;;
*) echo "build-crate.sh: no linker known for VZ_TARGET=$VZ_TARGET" >&2 && exit 2 ;;
esac

python3 /in/rust/vendor.py source /in/source "$root/source"
python3 /in/rust/vendor.py vendor "$root/source" /in/crates "$root/vendor"

mkdir -p "$HOME/.cargo"
cat >"$HOME/.cargo/config.toml" <<EOF
[source.crates-io]
replace-with = "vendored"
[source.vendored]
directory = "$root/vendor"
EOF

# Static, and free of what differs between two builds: the path, a random build id, how the work was cut.
flags="-C target-feature=+crt-static -C link-arg=-Wl,--build-id=none --remap-path-prefix=$root=/build"
target_env=$(printf %s "$VZ_TARGET" | tr a-z- A-Z_)
export "CARGO_TARGET_${target_env}_RUSTFLAGS=$flags" "CARGO_TARGET_${target_env}_LINKER=$linker"
# Build scripts and procedural macros run here.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=gcc
export CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 CARGO_PROFILE_RELEASE_STRIP=symbols CARGO_INCREMENTAL=0
export CARGO_TARGET_DIR="$root/target" CARGO_NET_OFFLINE=true PKG_CONFIG_ALLOW_CROSS=1

cd source
cp Cargo.lock "$root/Cargo.lock.pinned"
cargo update --workspace --quiet
python3 /in/rust/vendor.py check Cargo.lock "$root/Cargo.lock.pinned"
# shellcheck disable=SC2086 # words, by contract
cargo build --release --locked --target "$VZ_TARGET" --bin "$VZ_BIN" --jobs "$VZ_CORES" ${VZ_CARGO_ARGS-}

install -m 0555 "$root/target/$VZ_TARGET/release/$VZ_BIN" "/out/$VZ_BIN"
