#!/bin/sh
# take.sh PROGRAM: takes a program out of the image, with the loader and the libraries that it was linked with.
#
# in:  /in/src/          this directory
# out: /out/<name>       starts the program, wherever this directory is
#      /out/lib/<name>   the loader, by the program's name, which is what `ps` shows
#      /out/lib/         the libraries; the program, as `program`
set -eu
program=$1
name=${program##*/}
loader=$(readlink -f /lib64/ld-linux-x86-64.so.2)

mkdir /out/lib
cp "$program" /out/lib/program
cp "$loader" "/out/lib/$name"
"$loader" --list "$program" > /build/list
sed -n 's/^.* => \(\/[^ ]*\) (.*/\1/p' /build/list | grep -v /ld-linux > /build/libraries
while read -r library; do cp "$(readlink -f "$library")" "/out/lib/${library##*/}"; done < /build/libraries

cat > "/out/$name" << END
#!/bin/sh
lib=\$(dirname -- "\$(readlink -f -- "\$0")")/lib
exec "\$lib/$name" --library-path "\$lib" "\$lib/program" "\$@"
END
chmod 755 "/out/$name" "/out/lib/$name"
"/out/$name" --version
