//! The probes by name, as `recipes/kernel/capabilities.py` lists them.

mod btrfs;
mod console;
mod container;
mod crypt;
mod devices;
mod ext4;
mod kvm;
mod mapper;
mod netns;
mod nfsd;
mod overlay;
mod seccomp;
mod tun;
mod uring;
mod virtiofs;
mod vsock;

use crate::outcome::Probe;

pub use vsock::connect_to_host;

const PROBES: [(&str, Probe); 15] = [
    ("btrfs_snapshots", btrfs::probe),
    ("container_sandbox", container::probe),
    ("device_mapper", mapper::probe),
    ("dm_crypt", crypt::probe),
    ("ext4_root", ext4::probe),
    ("hvc0_serial", console::probe),
    ("io_uring", uring::probe),
    ("nested_virt", kvm::probe),
    ("netns", netns::probe),
    ("nfsd", nfsd::probe),
    ("overlayfs", overlay::probe),
    ("seccomp", seccomp::probe),
    ("tun", tun::probe),
    ("virtiofs", virtiofs::probe),
    ("vsock", vsock::probe),
];

/// The probe called `name`.
pub fn find(name: &str) -> Option<Probe> {
    PROBES.iter().find(|(known, _)| *known == name).map(|(_, probe)| *probe)
}

/// All names.
pub fn names() -> Vec<&'static str> {
    PROBES.iter().map(|(name, _)| *name).collect()
}
