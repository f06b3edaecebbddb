"""The programs that hosts run in a guest's root, and for each a use with what it prints."""

from __future__ import annotations

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where hosts' commands are looked for."""

USES: dict[str, tuple[str, str]] = {
    "awk": (r"""printf 'a 1\nb 2\n' | awk '{ sum += $2; seen[$1] } END { print sum, length(seen) }'""", "3 2\n"),
    "blkid": (
        """
        mke2fs -F -L marked /dev/vda > /dev/null
        blkid /dev/vda | grep -o 'LABEL="[^"]*"'
        """,
        'LABEL="marked"\n',
    ),
    "cat": ("echo x | cat - /dev/null", "x\n"),
    "chmod": ("touch a && chmod u=rw,go= a && stat -c %a a", "600\n"),
    "chroot": ("mkdir bin && cp -L /bin/busybox bin && chroot . /bin/busybox ls /", "bin\n"),
    "cp": ("echo x > a && chmod 750 a && cp -a a b && stat -c %a b", "750\n"),
    "cut": ("echo a:b:c | cut -d : -f 2-", "b:c\n"),
    "date": ("date -u -d @0 +%Y-%m-%d", "1970-01-01\n"),
    "df": ("df -P / | awk 'NR == 2 { print $6 }'", "/\n"),
    "dmesg": ("dmesg | grep -c 'Linux version'", "1\n"),
    "du": ("dd if=/dev/zero of=f bs=1k count=64 2> /dev/null && du -k f | cut -f 1", "64\n"),
    "echo": (r"/bin/echo -n a; /bin/echo -e 'b\tc'", "ab\tc\n"),
    "env": ("env -i A=1 /bin/env", "A=1\n"),
    "expr": ("expr 6 '*' 7", "42\n"),
    "fdisk": (
        r"""
        dd if=/dev/zero of=/dev/vda bs=4k count=1 2> /dev/null
        printf 'n\np\n1\n\n\nw\n' | fdisk /dev/vda > /dev/null 2>&1
        fdisk -l /dev/vda | grep -o '^/dev/vda1'
        """,
        "/dev/vda1\n",
    ),
    "find": ("mkdir a && touch a/x.c a/y && find . -name '*.c' -exec echo found {} ';'", "found ./a/x.c\n"),
    "free": ("free -m | awk '/^Mem:/ { print ($2 > 100) }'", "1\n"),
    "grep": (r"printf 'a1\nb2\n' | grep -E '^[b-z][0-9]$'", "b2\n"),
    "gunzip": ("seq 99 > f && gzip f && gunzip f.gz && tail -n 1 f", "99\n"),
    "gzip": ("seq 99 > f && gzip -9 f && ls && gzip -dc f.gz | tail -n 1", "f.gz\n99\n"),
    "head": ("seq 9 | head -n 1; seq 9 | head -c 1", "1\n1"),
    "hostname": ("unshare -u sh -c 'hostname other && hostname'", "other\n"),
    "id": ("id -u; id -un", "0\nroot\n"),
    "ifconfig": ("ifconfig lo | grep -o addr:127.0.0.1", "addr:127.0.0.1\n"),
    "ip": (
        """
        ip link add name d0 type veth peer name d1
        ip addr add 10.9.8.7/24 dev d0
        ip -4 -o addr show dev d0 | grep -o 10.9.8.7/24
        ip link del d0
        """,
        "10.9.8.7/24\n",
    ),
    "kill": ("/bin/sleep 1000 & /bin/kill -TERM $!; wait $! 2> /dev/null; echo $?", "143\n"),
    "less": ("echo text > f && less f", "text\n"),
    "ln": ("ln -s /etc a && ln -sfn /tmp a && readlink a", "/tmp\n"),
    "lsof": (
        """
        exec 9< /etc/passwd
        lsof | grep "^$$[^0-9]" | grep -o /etc/passwd
        """,
        "/etc/passwd\n",
    ),
    "md5sum": ("printf abc | md5sum", "900150983cd24fb0d6963f7d28e17f72  -\n"),
    "mkdir": ("mkdir -p a/b/c && ls a/b", "c\n"),
    "mke2fs": (
        """
        set -e
        mke2fs -F /dev/vda > /dev/null
        mkdir -p /run/vz-oci/volumes
        mount -t ext4 /dev/vda /run/vz-oci/volumes
        echo kept > /run/vz-oci/volumes/f
        umount /run/vz-oci/volumes
        mount -t ext4 /dev/vda /run/vz-oci/volumes
        cat /run/vz-oci/volumes/f
        umount /run/vz-oci/volumes
        """,
        "kept\n",
    ),
    "mount": ("""mkdir m && mount -t tmpfs t m && grep -c " $PWD/m tmpfs" /proc/mounts && umount m""", "1\n"),
    "mountpoint": ("mountpoint -q /proc && mountpoint -q / && ! mountpoint -q . && echo both", "both\n"),
    "mv": ("echo x > a && mv a b && ls", "b\n"),
    "nc": (
        """
        nc -l -p 4001 > got &
        until echo over | nc 127.0.0.1 4001 2> /dev/null; do sleep 0.01; done
        wait $!
        cat got
        """,
        "over\n",
    ),
    "netstat": (
        """
        nc -l -p 4000 -s 127.0.0.1 < /dev/null 2> /dev/null &
        until netstat -ltn | grep -o 127.0.0.1:4000; do sleep 0.01; done
        kill $!
        """,
        "127.0.0.1:4000\n",
    ),
    "nohup": ("nohup sh -c 'kill -HUP $$; echo stayed' 2> /dev/null", "stayed\n"),
    "nsenter": (
        """
        unshare --mount --net --pid --ipc --uts --fork --mount-proc sh -c 'hostname inner; exec sleep 1000' &
        until p=$(pgrep -P $!) && grep -q sleep /proc/$p/cmdline; do sleep 0.01; done
        n=/proc/$p/ns
        nsenter --mount=$n/mnt --net=$n/net --pid=$n/pid --ipc=$n/ipc --uts=$n/uts --root=/proc/$p/root \
            --wd=/proc/$p/root/tmp sh -c 'hostname; pwd; ip -o link | wc -l; cat /proc/1/comm'
        hostname | grep -c inner
        kill $p
        """,
        "inner\n/tmp\n1\nsleep\n0\n",
    ),
    "ping": ("ping -c 1 -W 5 127.0.0.1 | grep -o '1 packets received'", "1 packets received\n"),
    "printf": (r"/bin/printf '%s-%03d\n' a 7", "a-007\n"),
    "ps": ("ps | grep -c '[v]z-guest-agent'", "1\n"),
    "rm": ("mkdir -p a/b && rm -rf a && ls", ""),
    "route": (
        """
        ip route add 192.0.2.0/24 dev lo
        route -n | grep -o '^192.0.2.0'
        ip route del 192.0.2.0/24
        """,
        "192.0.2.0\n",
    ),
    "sed": ("echo abc | sed -n -e s/b/-/p", "a-c\n"),
    "sh": ("/bin/sh -lc 'echo $((6 * 7))'", "42\n"),
    "sha256sum": (
        "printf abc | sha256sum",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  -\n",
    ),
    "sleep": ("sleep 0.01 && echo up", "up\n"),
    "sort": (r"printf '10\n9\n' | sort -n", "9\n10\n"),
    "stat": ("printf abc > f && stat -c '%s %F' f", "3 regular file\n"),
    # The kernels have no swap, and it is the program that says so.
    "swapon": (
        """
        dd if=/dev/zero of=f bs=4k count=16 2> /dev/null
        mkswap f > /dev/null
        swapon f 2>&1 | cut -d : -f 1
        """,
        "swapon\n",
    ),
    "sync": ("echo x > f && sync && sync f && echo done", "done\n"),
    "tail": ("seq 9 | tail -n 1; seq 9 | tail -n +9", "9\n9\n"),
    "tar": (
        """
        mkdir -p a/b c && echo x > a/b/f && chmod 4751 a/b/f && ln -s f a/b/l
        tar -C a -cpf t.tar . && tar -C c -xpf t.tar && stat -c %a c/b/f && readlink c/b/l
        tar -czf t.tgz a && tar -tzf t.tgz | sort | tail -n 1
        """,
        "4751\nf\na/b/l\n",
    ),
    "top": ("top -b -n 1 | head -n 1 | cut -d : -f 1", "Mem\n"),
    "tr": ("echo abc | tr a-c A-C", "ABC\n"),
    "traceroute": ("traceroute -n -q 1 127.0.0.1 | awk '$1 == 1 { print $2 }'", "127.0.0.1\n"),
    "udhcpc": (
        "/sbin/udhcpc -n -q -f -i eth0 -s /bin/true 2>&1 | grep -o 'lease of 10.0.2.15'",
        "lease of 10.0.2.15\n",
    ),
    "umount": ("mkdir m && mount -t tmpfs t m && touch m/f && umount m && ls m", ""),
    "uniq": (r"printf 'a\na\nb\n' | uniq -d", "a\n"),
    "unshare": ("unshare -n ip -o link | wc -l", "1\n"),
    "uptime": ("uptime | grep -c 'load average'", "1\n"),
    "vi": ("echo abc > f && vi -c %s/b/-/ -c wq f > /dev/null && cat f", "a-c\n"),
    "wc": ("seq 12 | wc -l", "12\n"),
    "which": ("which udhcpc", "/usr/sbin/udhcpc\n"),
    "xargs": ("seq 3 | xargs -n 2 echo", "1 2\n3\n"),
    "zcat": ("seq 99 | gzip > f.gz && zcat f.gz | tail -n 1", "99\n"),
}
"""Name → a script, for an empty directory, and all that it prints. The guest has a disk /dev/vda of its own, and in its
root only what is ours. `wget` is missing: it needs a server."""
