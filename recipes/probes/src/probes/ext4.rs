//! `ext4_root`: a virtio disk with ext4 serves as a root: a program runs from it, owners, ACLs and file capabilities
//! are kept across a remount.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, chown, chroot};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::block::disk_with;
use crate::outcome::{Failure, Outcome, Step, ensure};
use crate::sys;

const ROOT: &str = "/tmp/root";
const BUSYBOX: &str = "/tmp/root/busybox";

// Extended attributes as stored: version 2, then entries (tag, permissions, id); version 2 with the effective bit,
// cap_net_bind_service.
const ACL: &str = "system.posix_acl_access";
const ACL_VALUE: [u8; 44] = [
    2, 0, 0, 0, //
    0x01, 0, 7, 0, 0xff, 0xff, 0xff, 0xff, // owner: rwx
    0x02, 0, 5, 0, 0xd2, 4, 0, 0, // user 1234: r-x
    0x04, 0, 5, 0, 0xff, 0xff, 0xff, 0xff, // group: r-x
    0x10, 0, 5, 0, 0xff, 0xff, 0xff, 0xff, // mask: r-x
    0x20, 0, 5, 0, 0xff, 0xff, 0xff, 0xff, // others: r-x
];
const CAPABILITY: &str = "security.capability";
const CAPABILITY_VALUE: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub fn probe() -> Outcome {
    let disk = disk_with(0x438, &[0x53, 0xEF], "an ext4")?;
    fs::create_dir(ROOT).step("mkdir")?;
    sys::mount(&disk, ROOT, "ext4", 0, "").step("mount ext4")?;
    fs::copy("/bin/busybox", BUSYBOX).step("write a file on ext4")?;
    chown(BUSYBOX, Some(1234), Some(5678)).step("chown on ext4")?;
    set_attribute(ACL, &ACL_VALUE).step("set an ACL on ext4")?;
    set_attribute(CAPABILITY, &CAPABILITY_VALUE).step("set a file capability on ext4")?;
    File::open(BUSYBOX)
        .and_then(|file| file.sync_all())
        .step("fsync on ext4")?;
    sys::unmount(ROOT).step("unmount ext4")?;

    sys::mount(&disk, ROOT, "ext4", libc::MS_RDONLY, "").step("mount ext4 again")?;
    let metadata = fs::metadata(BUSYBOX).step("the file after the remount")?;
    ensure(
        (metadata.uid(), metadata.gid()) == (1234, 5678),
        "the owner was not kept",
    )?;
    ensure(
        attribute(ACL).step("read the ACL")? == ACL_VALUE,
        "the ACL was not kept",
    )?;
    let capability = attribute(CAPABILITY).step("read the file capability")?;
    ensure(capability == CAPABILITY_VALUE, "the file capability was not kept")?;

    let mut inside = Command::new("/busybox");
    inside.args(["stat", "-f", "-c", "%T", "/"]);
    unsafe {
        inside.pre_exec(|| {
            chroot(ROOT)?;
            std::env::set_current_dir("/")
        });
    }
    let output = inside.output().step("run a program with the ext4 as its root")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_string();
    if said != "ext2/ext3" && said != "ext4" {
        return Err(Failure::new(format!(
            "a program with the ext4 as its root finds it is {said:?}"
        )));
    }
    Ok("a virtio disk is written, mounted again, keeps owner, ACL and file capability, and serves as a root".into())
}

fn set_attribute(name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (CString::new(BUSYBOX)?, CString::new(name)?);
    sys::check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) }).map(drop)
}

fn attribute(name: &str) -> io::Result<Vec<u8>> {
    let (path, name) = (CString::new(BUSYBOX)?, CString::new(name)?);
    let mut value = vec![0; 256];
    let length =
        sys::check(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })?;
    value.truncate(length as usize);
    Ok(value)
}
