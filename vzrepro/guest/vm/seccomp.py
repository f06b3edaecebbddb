"""The system calls that a container may make when nobody says otherwise, as an OCI runtime's seccomp filter for arm64.

Allowed is what programs need inside their own container. What would reach out of it (mounts, namespaces, modules,
clocks, other processes' secrets) is refused with EPERM, whatever capabilities the container has; what is not listed at
all does not exist (ENOSYS), so that C libraries fall back to what is. Names that arm64 has no number for are left out.
"""

from __future__ import annotations

from typing import Any

_EPERM, _ENOSYS = 1, 38
_AF_VSOCK = 40  # the way to the host, and that is the guest's own
_CLONE_NEW = 0x7E02_0000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}

_ALLOWED = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg
    sendto setsockopt shutdown socketpair
    adjtimex brk cachestat capget capset chdir chroot clock_adjtime clock_getres clock_gettime clock_nanosleep close
    close_range copy_file_range dup dup3 epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 eventfd2 execve execveat exit
    exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync
    fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait
    futex_waitv futex_wake get_robust_list getcpu getcwd getdents64 getegid geteuid getgid getgroups getitimer getpgid
    getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid gettimeofday getuid
    getxattr inotify_add_watch inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup
    io_submit ioctl ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self
    lgetxattr linkat listxattr llistxattr lremovexattr lseek lsetxattr madvise membarrier memfd_create memfd_secret
    mincore mkdirat mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
    mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap nanosleep newfstatat
    openat openat2 pidfd_getfd pidfd_open pidfd_send_signal pipe2 pkey_alloc pkey_free pkey_mprotect ppoll prctl pread64
    preadv preadv2 prlimit64 process_madvise process_mrelease process_vm_readv process_vm_writev pselect6 ptrace
    pwrite64 pwritev pwritev2 read readahead readlinkat readv remap_file_pages removexattr renameat renameat2
    restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
    sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp semctl semget semop semtimedop sendfile set_robust_list set_tid_address
    setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit
    setsid setuid setxattr shmat shmctl shmdt shmget sigaltstack signalfd4 splice statfs statx symlinkat sync
    sync_file_range syncfs sysinfo tee tgkill timer_create timer_delete timer_getoverrun timer_gettime timer_settime
    timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlinkat utimensat vmsplice wait4
    waitid write writev
"""

_REFUSED = """
    acct add_key bpf clock_settime delete_module fanotify_init fanotify_mark finit_module fsconfig fsmount fsopen fspick
    get_mempolicy init_module kcmp kexec_file_load kexec_load keyctl listmount lookup_dcookie mbind migrate_pages mount
    mount_setattr move_mount move_pages name_to_handle_at open_by_handle_at open_tree perf_event_open pivot_root
    quotactl quotactl_fd reboot request_key set_mempolicy set_mempolicy_home_node setdomainname sethostname setns
    settimeofday statmount swapoff swapon syslog umount2 unshare userfaultfd vhangup
"""

# The calls that give a file its mode, with the argument that holds it.
_MODES = {"fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "mknodat": 2, "openat": 3}
_HIDES_MODE = "openat2"  # in a structure, which no filter can see; C libraries then use openat
_S_ISUID = 0o4000
_CREATES = 0o20000100  # O_CREAT and the bit of its own that O_TMPFILE has; without them there is no mode

# PER_LINUX, PER_LINUX32, and asking which one it is.
_PERSONALITIES = (0, 8, 0xFFFF_FFFF)


def profile(*, set_uid: bool = True) -> dict[str, Any]:
    """The filter as `linux.seccomp` of a config.json; without `set_uid` no file can be given the set-uid bit."""

    def rule(names: list[str], action: str, *arguments: dict[str, Any], errno: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"names": names, "action": f"SCMP_ACT_{action}"}
        if arguments:
            found["args"] = list(arguments)
        if errno is not None:
            found["errnoRet"] = errno
        return found

    def argument(index: int, op: str, value: int) -> dict[str, Any]:
        return {"index": index, "value": value, "op": f"SCMP_CMP_{op}"}

    def masked(index: int, mask: int, wanted: int) -> dict[str, Any]:
        # The specification has it the other way round, `value` for the mask; with that, youki 0.7.0 takes everything.
        return {**argument(index, "MASKED_EQ", wanted), "valueTwo": mask}

    allowed, no_set_uid = _ALLOWED.split(), []
    if not set_uid:
        allowed = [name for name in allowed if name not in _MODES and name != _HIDES_MODE]
        no_set_uid.append(rule(["openat"], "ALLOW", masked(2, _CREATES, 0)))
        for name, index in _MODES.items():
            no_set_uid.append(rule([name], "ALLOW", masked(index, _S_ISUID, 0)))
            if name != "openat":  # there the two conditions above are all that one filter can decide
                refused = masked(index, _S_ISUID, _S_ISUID)
                no_set_uid.append(rule([name], "ERRNO", refused, errno=_EPERM))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _ENOSYS,
        "architectures": ["SCMP_ARCH_AARCH64"],
        "syscalls": [
            rule(allowed, "ALLOW"),
            *no_set_uid,
            # No new namespaces. clone3 keeps its flags where no filter can see them; C libraries then use clone.
            rule(["clone"], "ALLOW", masked(0, _CLONE_NEW, 0)),
            rule(["socket"], "ALLOW", argument(0, "NE", _AF_VSOCK)),
            *(rule(["personality"], "ALLOW", argument(0, "EQ", value)) for value in _PERSONALITIES),
            rule(_REFUSED.split(), "ERRNO", errno=_EPERM),
        ],
    }
