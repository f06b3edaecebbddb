//! Thin wrappers around the system calls that several probes make.

use std::ffi::{CString, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a device file may take to come.
const APPEARS: Duration = Duration::from_secs(60);

/// The result of a system call as the C library returns it: -1 means that errno says why.
pub fn check<T: Copy + PartialEq + From<i8>>(result: T) -> io::Result<T> {
    if result == T::from(-1) {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A pipe whose ends do not outlive an exec.
pub fn pipe() -> io::Result<(File, File)> {
    let mut ends = [0; 2];
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok(unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) })
}

/// mount(2); empty `kind` and `options` are null pointers.
pub fn mount(source: &str, target: &str, kind: &str, flags: c_ulong, options: &str) -> io::Result<()> {
    let (source, target) = (CString::new(source)?, CString::new(target)?);
    let (kind, options) = (CString::new(kind)?, CString::new(options)?);
    let or_null = |text: &CString| {
        if text.is_empty() {
            std::ptr::null()
        } else {
            text.as_ptr()
        }
    };
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            or_null(&kind),
            flags,
            or_null(&options).cast(),
        )
    })
    .map(drop)
}

/// umount(2).
pub fn unmount(target: &str) -> io::Result<()> {
    let target = CString::new(target)?;
    check(unsafe { libc::umount(target.as_ptr()) }).map(drop)
}

/// ioctl(2) with a pointer to `argument`, whose size must be what `request` says.
pub fn ioctl<T>(file: &impl AsRawFd, request: u32, argument: &mut T) -> io::Result<i32> {
    check(unsafe { libc::ioctl(file.as_raw_fd(), request.into(), argument as *mut T) })
}

/// ioctl(2) with a number.
pub fn ioctl_number(file: &impl AsRawFd, request: u32, argument: u64) -> io::Result<i32> {
    check(unsafe { libc::ioctl(file.as_raw_fd(), request.into(), argument) })
}

/// A new character device `path`.
pub fn make_device(path: &str, major: u32, minor: u32) -> io::Result<()> {
    let path = CString::new(path)?;
    check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(major, minor)) }).map(drop)
}

/// A socket that does not outlive an exec.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Wait until `path` exists: the kernel makes device files in its own time. False when it does not come.
pub fn appears(path: &str) -> bool {
    let limit = Instant::now() + APPEARS;
    while !Path::new(path).exists() {
        if Instant::now() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}
