//! The device controller of cgroup v2, part of `container_sandbox`: a BPF program denies a cgroup every device.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::outcome::{Failure, Step, ensure};
use crate::sys;

const CGROUP: &str = "/sys/fs/cgroup/vz-probe-devices";
/// `r0 = 0; exit`: no.
const DENY: [u64; 2] = [0x0000_0000_0000_00b7, 0x0000_0000_0000_0095];

// linux/bpf.h
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_TYPE_CGROUP_DEVICE: u32 = 6;

#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    rest: [u64; 4],
}

#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Deny a cgroup all devices, and open one in it and one outside.
pub fn probe() -> Result<(), Failure> {
    fs::create_dir(CGROUP).step("make a cgroup")?;
    let found = denied();
    let _ = fs::remove_dir(CGROUP); // as soon as nobody is in it
    found
}

fn denied() -> Result<(), Failure> {
    let load = Load {
        kind: PROG_TYPE_CGROUP_DEVICE,
        instructions: DENY.len() as u32,
        code: DENY.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
        rest: [0; 4],
    };
    let program = bpf(PROG_LOAD, &load).step("load a device filter")?;
    // Sound: the call made a file descriptor that nobody else owns.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let cgroup = File::open(CGROUP).step("open the cgroup")?;
    let attach = Attach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: ATTACH_TYPE_CGROUP_DEVICE,
        flags: 0,
    };
    bpf(PROG_ATTACH, &attach).step("attach the device filter")?;

    let child = sys::check(unsafe { libc::fork() }).step("fork")?;
    if child == 0 {
        let entered = fs::write(format!("{CGROUP}/cgroup.procs"), "0");
        let opened = File::open("/dev/zero").map_err(|error| error.raw_os_error());
        let code = match (entered, opened) {
            (Ok(()), Err(Some(libc::EPERM))) => 0,
            (Err(_), _) => 1,
            _ => 2,
        };
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    sys::check(unsafe { libc::waitpid(child, &mut status, 0) }).step("wait")?;
    let code = libc::WEXITSTATUS(status);
    ensure(
        libc::WIFEXITED(status) && code != 1,
        "a process cannot enter the cgroup",
    )?;
    ensure(code == 0, "a device opens in a cgroup that is denied all devices")?;
    File::open("/dev/zero").step("a device outside of the cgroup").map(drop)
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> std::io::Result<i32> {
    sys::check(unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *const T, size_of::<T>()) })
        .map(|value| value as i32)
}
