//! `hvc0_serial`: the kernel's console is the virtio console, and what is written there the host reads.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::outcome::{Outcome, Step, ensure};
use crate::sys;

pub fn probe() -> Outcome {
    let active = fs::read_to_string("/sys/class/tty/console/active").step("/sys/class/tty/console/active")?;
    ensure(
        active.split_whitespace().any(|name| name == "hvc0"),
        "hvc0 is not a console of the kernel",
    )?;
    let mut console = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/hvc0")
        .step("/dev/hvc0")?;
    ensure(
        unsafe { libc::isatty(console.as_raw_fd()) } == 1,
        "/dev/hvc0 is no terminal",
    )?;
    // The host looks for this line.
    console
        .write_all(b"vz-probe: written to hvc0\n")
        .step("write to /dev/hvc0")?;
    sys::check(unsafe { libc::tcdrain(console.as_raw_fd()) }).step("drain /dev/hvc0")?;
    Ok("the kernel's console is a terminal that the host reads".into())
}
