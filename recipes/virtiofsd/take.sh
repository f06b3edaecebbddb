#!/bin/sh
# Takes virtiofsd out of the image, with the loader and the libraries that it was linked with.
#
# in:  /in/src/              this directory
# out: /out/virtiofsd        starts the program, wherever this directory is
#      /out/lib/             the loader, by the program's name, which is what `ps` shows; the libraries
#      /out/lib/program      the program
set -eu
program=/usr/libexec/virtiofsd
loader=$(readlink -f /lib64/ld-linux-x86-64.so.2)

mkdir /out/lib
cp "$program" /out/lib/program
cp "$loader" /out/lib/virtiofsd
"$loader" --list "$program" | grep -v ld-linux | sed -n 's/^.* => \(\/[^ ]*\) (.*/\1/p' > /build/libraries
[ -s /build/libraries ]
while read -r library; do cp "$(readlink -f "$library")" "/out/lib/${library##*/}"; done < /build/libraries

cat > /out/virtiofsd << 'END'
#!/bin/sh
lib=$(dirname -- "$(readlink -f -- "$0")")/lib
exec "$lib/virtiofsd" --library-path "$lib" "$lib/program" "$@"
END
chmod 755 /out/virtiofsd /out/lib/virtiofsd
/out/virtiofsd --version
