# Runs in the container as its process 1, busybox its shell: one line for each thing that must hold.
b=/bin/busybox
echo "pid $$"
echo "host $($b hostname)"
echo "user $($b id -u):$($b id -g)"
echo "cgroup $($b cat /proc/self/cgroup)"
echo "interfaces $($b ls /sys/class/net | $b xargs $b echo)"
for limit in memory.max pids.max cpu.max; do
    echo "$limit $($b cat /sys/fs/cgroup/$limit)"
done
$b grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | $b tr '\t' ' '
$b mkdir /tmp/made 2>&1 | $b sed 's/.*: /mkdir: /'
(: > /made) 2>&1 | $b sed 's/.*: /root: /'
: > /dev/null && echo "null: open"
# One block larger than the limit.
$b dd if=/dev/zero of=/dev/null bs=96M count=1 2> /dev/null
[ $? = 137 ] && echo "memory: killed"
exit 0
