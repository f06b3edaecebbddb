//! What a profile must not contain, looked for where it would show.

use std::fs;
use std::io;
use std::path::Path;

use crate::outcome::{Failure, Outcome, Probe, Step, ensure};
use crate::sys;

const PROBES: [(&str, Probe); 12] = [
    ("9p", plan9),
    ("ata", || paths(&["/sys/class/ata_port", "/sys/class/ata_link"])),
    ("devmem", || {
        devices(&["/dev/mem", "/dev/kmem", "/dev/port"], &[(1, 1), (1, 2), (1, 4)])
    }),
    ("fat", || filesystems(&["vfat", "msdos"])),
    ("ikconfig", || paths(&["/proc/config.gz"])),
    ("kvm", || devices(&["/dev/kvm", "/sys/class/misc/kvm"], &[(10, 232)])),
    ("modules", modules),
    ("nfs", || filesystems(&["nfs", "nfs4"])),
    ("scsi", || {
        paths(&["/sys/bus/scsi", "/sys/class/scsi_host", "/proc/scsi"])
    }),
    ("squashfs", || filesystems(&["squashfs"])),
    ("tun", || {
        devices(&["/dev/net/tun", "/sys/class/misc/tun"], &[(10, 200)])
    }),
    ("usb", || paths(&["/sys/bus/usb", "/sys/class/udc", "/sys/bus/gadget"])),
];

/// The probe that `what` is not there.
pub fn find(what: &str) -> Option<Probe> {
    PROBES.iter().find(|(known, _)| *known == what).map(|(_, probe)| *probe)
}

/// All names, as they are given on the command line.
pub fn names() -> Vec<String> {
    PROBES.iter().map(|(name, _)| format!("absent:{name}")).collect()
}

fn paths(listed: &[&str]) -> Outcome {
    for path in listed {
        ensure(!Path::new(path).exists(), format!("{path} is there"))?;
    }
    Ok(format!("no {}", listed.join(", no ")))
}

/// Neither the files, nor what devices of these numbers, made by ourselves, would open.
fn devices(files: &[&str], numbers: &[(u32, u32)]) -> Outcome {
    let absent = paths(files)?;
    for (major, minor) in numbers {
        let path = format!("/tmp/{major}-{minor}");
        sys::make_device(&path, *major, *minor).step("mknod")?;
        ensure(
            fs::File::open(&path).is_err(),
            format!("a device {major}:{minor} opens"),
        )?;
    }
    Ok(format!("{absent}; such a device does not open"))
}

fn filesystems(kinds: &[&str]) -> Outcome {
    let known = fs::read_to_string("/proc/filesystems").step("/proc/filesystems")?;
    fs::create_dir("/tmp/mounted").step("mkdir")?;
    for kind in kinds {
        let listed = known.lines().any(|line| line.split_whitespace().last() == Some(kind));
        ensure(!listed, format!("{kind} is in /proc/filesystems"))?;
        let error = match sys::mount("none", "/tmp/mounted", kind, 0, "") {
            Ok(()) => return Err(Failure::new(format!("{kind} can be mounted"))),
            Err(error) => error,
        };
        ensure(
            error.raw_os_error() == Some(libc::ENODEV),
            format!("mounting {kind} does not fail as an unknown file system does: {error}"),
        )?;
    }
    Ok(format!("{} cannot be mounted: no such file system", kinds.join(", ")))
}

fn plan9() -> Outcome {
    let mounting = filesystems(&["9p"])?;
    Ok(format!(
        "{mounting}; {}",
        paths(&["/sys/bus/virtio/drivers/9pnet_virtio"])?
    ))
}

fn modules() -> Outcome {
    paths(&["/proc/modules"])?;
    let loaded = sys::check(unsafe { libc::syscall(libc::SYS_init_module, c"".as_ptr(), 0, c"".as_ptr()) });
    match loaded.map_err(|error: io::Error| error.raw_os_error()) {
        Err(Some(libc::ENOSYS)) => Ok("no /proc/modules; the call that loads a module does not exist".into()),
        _ => Err(Failure::new("the call that loads a module exists")),
    }
}
