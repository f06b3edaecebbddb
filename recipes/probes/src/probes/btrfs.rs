//! `btrfs_snapshots`: a snapshot of a subvolume keeps what the subvolume held, across a remount.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use crate::block::disk_with;
use crate::outcome::{Outcome, Step, ensure};
use crate::sys;

// linux/btrfs.h
const IOC_SUBVOL_CREATE: u32 = 0x5000_940e;
const IOC_SNAP_CREATE_V2: u32 = 0x5000_9417;
const SUBVOLUME_INODE: u64 = 256;

#[repr(C)]
struct CreateArguments {
    fd: i64,
    name: [u8; 4088],
}

#[repr(C)]
struct SnapshotArguments {
    fd: i64,
    transaction: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

pub fn probe() -> Outcome {
    let disk = disk_with(0x10040, b"_BHRfS_M", "a btrfs")?;
    fs::create_dir("/tmp/btrfs").step("mkdir")?;
    sys::mount(&disk, "/tmp/btrfs", "btrfs", 0, "").step("mount btrfs")?;
    let top = File::open("/tmp/btrfs").step("open the top")?;
    let mut create = CreateArguments { fd: 0, name: [0; 4088] };
    create.name[..8].copy_from_slice(b"original");
    sys::ioctl(&top, IOC_SUBVOL_CREATE, &mut create).step("create a subvolume")?;
    // More than what btrfs keeps inside its tree: the snapshot shares extents.
    let before = vec![b'b'; 64 * 1024];
    let after = vec![b'a'; 64 * 1024];
    fs::write("/tmp/btrfs/original/file", &before).step("write to the subvolume")?;

    let original = File::open("/tmp/btrfs/original").step("open the subvolume")?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&original);
    let mut snapshot = SnapshotArguments {
        fd: fd.into(),
        transaction: 0,
        flags: 0,
        unused: [0; 4],
        name: [0; 4040],
    };
    snapshot.name[..8].copy_from_slice(b"snapshot");
    sys::ioctl(&top, IOC_SNAP_CREATE_V2, &mut snapshot).step("take a snapshot")?;
    fs::write("/tmp/btrfs/original/file", &after).step("change the original")?;
    fs::write("/tmp/btrfs/original/new", "new").step("add to the original")?;
    drop((top, original));
    sys::unmount("/tmp/btrfs").step("unmount btrfs")?;

    sys::mount(&disk, "/tmp/btrfs", "btrfs", libc::MS_RDONLY, "").step("mount btrfs again")?;
    let read = |path: &str| fs::read(path).step(path);
    ensure(
        read("/tmp/btrfs/snapshot/file")? == before,
        "the snapshot does not hold what was there when it was taken",
    )?;
    ensure(
        read("/tmp/btrfs/original/file")? == after,
        "the original does not hold what was written last",
    )?;
    ensure(
        !fs::exists("/tmp/btrfs/snapshot/new").step("the snapshot")?,
        "the snapshot has a file made later",
    )?;
    let metadata = |path: &str| fs::metadata(path).step(path);
    let (original, snapshot) = (metadata("/tmp/btrfs/original")?, metadata("/tmp/btrfs/snapshot")?);
    ensure(
        original.ino() == SUBVOLUME_INODE && snapshot.ino() == SUBVOLUME_INODE && original.dev() != snapshot.dev(),
        "original and snapshot are not two subvolumes",
    )?;
    Ok("a snapshot of a subvolume is read back after the original changed and the disk was mounted again".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(size_of::<CreateArguments>(), 4096);
        assert_eq!(size_of::<SnapshotArguments>(), 4096);
    }
}
