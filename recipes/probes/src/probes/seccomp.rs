//! `seccomp`: a filter denies one system call and no other, and cannot be taken off.

use std::fs;
use std::io;

use crate::outcome::{Outcome, Step, ensure};
use crate::sys;

const SECCOMP_SET_MODE_FILTER: libc::c_long = 1;
/// Where the number of the call is in `struct seccomp_data`.
const NUMBER_OFFSET: u32 = 0;

pub fn probe() -> Outcome {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, NUMBER_OFFSET),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_uname as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    let mut names: libc::utsname = unsafe { std::mem::zeroed() };
    sys::check(unsafe { libc::uname(&mut names) }).step("uname before the filter")?;
    sys::check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).step("no_new_privs")?;
    sys::check(unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &raw const program) })
        .step("install a filter")?;

    let denied = sys::check(unsafe { libc::uname(&mut names) }).map_err(|error| error.raw_os_error());
    ensure(
        denied == Err(Some(libc::EPERM)),
        "the denied call did not fail with EPERM",
    )?;
    let status = fs::read_to_string("/proc/self/status").step("a call that is not denied")?;
    ensure(status.contains("Seccomp:\t2"), "the process is not in filter mode")?;
    // A child has the filter, too.
    let child = sys::check(unsafe { libc::fork() }).step("fork")?;
    if child == 0 {
        let denied =
            unsafe { libc::uname(&mut names) } == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EPERM);
        unsafe { libc::_exit(i32::from(!denied)) };
    }
    let mut status = 0;
    sys::check(unsafe { libc::waitpid(child, &mut status, 0) }).step("wait")?;
    ensure(status == 0, "a child of the filtered process makes the denied call")?;
    Ok("a filter denies a call with EPERM, in a child as well, and lets others through".into())
}
