//! Disks for probes: virtio disks known by what is on them, files as loop devices, device-mapper mappings.

use std::ffi::c_char;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::outcome::{Failure, Step, ensure};
use crate::sys;

/// Bytes per sector, the unit of the block layer.
pub const SECTOR: usize = 512;

/// The virtio disk that has `magic` at `offset`.
pub fn disk_with(offset: u64, magic: &[u8], what: &str) -> Result<String, Failure> {
    let mut names: Vec<String> = fs::read_dir("/sys/block")
        .step("/sys/block")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("vd"))
        .collect();
    names.sort();
    for name in &names {
        let path = format!("/dev/{name}");
        let mut found = vec![0; magic.len()];
        let read = File::open(&path).and_then(|mut disk| {
            disk.seek(SeekFrom::Start(offset))?;
            disk.read_exact(&mut found)
        });
        if read.is_ok() && found == magic {
            return Ok(path);
        }
    }
    Err(Failure::new(format!(
        "none of the {} virtio disks holds {what}",
        names.len()
    )))
}

/// A loop device over a file; detached when dropped.
pub struct Loop {
    device: File,
    /// Its device file.
    pub path: String,
}

// linux/loop.h
const LOOP_CTL_GET_FREE: u32 = 0x4C82;
const LOOP_SET_FD: u32 = 0x4C00;
const LOOP_CLR_FD: u32 = 0x4C01;

impl Loop {
    /// A free loop device over `file`, which is open for reading and writing.
    pub fn over(file: &File) -> Result<Self, Failure> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .step("/dev/loop-control")?;
        let number = sys::ioctl_number(&control, LOOP_CTL_GET_FREE, 0).step("a free loop device")?;
        let path = format!("/dev/loop{number}");
        ensure(sys::appears(&path), "the loop device has no file in /dev")?;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .step("open the loop device")?;
        sys::ioctl_number(&device, LOOP_SET_FD, file.as_raw_fd() as u64).step("attach the loop device")?;
        Ok(Self { device, path })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Fails only when it is detached already.
        let _ = sys::ioctl_number(&self.device, LOOP_CLR_FD, 0);
    }
}

/// A file of `sectors` in `/tmp`, each sector filled with its own number plus one.
pub fn numbered_file(path: &str, sectors: u8) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .step(path)?;
    for sector in 0..sectors {
        file.write_all_at(&[sector + 1; SECTOR], u64::from(sector) * SECTOR as u64)
            .step(path)?;
    }
    Ok(file)
}

/// One line of a device-mapper table, in sectors.
pub struct Target {
    /// Where it begins in the mapped device.
    pub start: u64,
    /// How long it is.
    pub length: u64,
    /// The target's type: `linear`, `crypt`.
    pub kind: &'static str,
    /// The type's own parameters.
    pub parameters: String,
}

/// A device-mapper device; removed when dropped.
pub struct Mapping {
    control: File,
    name: &'static str,
    /// Its device file.
    pub path: String,
}

// struct dm_ioctl and struct dm_target_spec of linux/dm-ioctl.h, interface version 4.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_number: u32,
    padding: u32,
    device: u64,
    name: [c_char; 128],
    uuid: [c_char; 129],
    data: [c_char; 7],
}

#[repr(C)]
struct Spec {
    start: u64,
    length: u64,
    status: i32,
    next: u32,
    kind: [c_char; 16],
}

#[repr(C)]
struct Request {
    header: Header,
    data: [u8; 4096],
}

const HEADER_BYTES: usize = size_of::<Header>();
const SPEC_BYTES: usize = size_of::<Spec>();
const CREATE: u32 = 3;
const REMOVE: u32 = 4;
const SUSPEND: u32 = 6; // without the flag to suspend: resume
const LOAD: u32 = 9;

impl Mapping {
    /// The device `name` with this table.
    pub fn new(name: &'static str, table: &[Target]) -> Result<Self, Failure> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/mapper/control")
            .step("/dev/mapper/control")?;
        let mut request = request(name);
        command(&control, CREATE, &mut request).step("create a mapped device")?;
        let minor = (request.header.device & 0xff) | ((request.header.device >> 12) & !0xff);
        let mapping = Self {
            control,
            name,
            path: format!("/dev/dm-{minor}"),
        };
        let mut request = self::request(name);
        fill(&mut request, table);
        command(&mapping.control, LOAD, &mut request).step("load the table")?;
        command(&mapping.control, SUSPEND, &mut self::request(name)).step("resume the mapped device")?;
        ensure(sys::appears(&mapping.path), "the mapped device has no file in /dev")?;
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A failing probe says why it failed; that its device stays does not matter then.
        let _ = command(&self.control, REMOVE, &mut request(self.name));
    }
}

fn request(name: &str) -> Box<Request> {
    // All of its fields are numbers.
    let mut request: Box<Request> = Box::new(unsafe { std::mem::zeroed() });
    request.header.version = [4, 0, 0];
    request.header.data_size = size_of::<Request>() as u32;
    request.header.data_start = HEADER_BYTES as u32;
    put(&mut request.header.name, name);
    request
}

fn put(field: &mut [c_char], text: &str) {
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from as c_char;
    }
}

fn fill(request: &mut Request, table: &[Target]) {
    request.header.target_count = table.len() as u32;
    let mut at = 0;
    for target in table {
        let bytes = SPEC_BYTES + target.parameters.len() + 1;
        let next = bytes.next_multiple_of(8);
        let mut spec = Spec {
            start: target.start,
            length: target.length,
            status: 0,
            next: next as u32,
            kind: [0; 16],
        };
        put(&mut spec.kind, target.kind);
        let parameters = at + SPEC_BYTES;
        // Spec has no padding: 8 + 8 + 4 + 4 + 16 bytes.
        let raw: [u8; SPEC_BYTES] = unsafe { std::mem::transmute(spec) };
        request.data[at..parameters].copy_from_slice(&raw);
        request.data[parameters..parameters + target.parameters.len()].copy_from_slice(target.parameters.as_bytes());
        at += next;
    }
}

fn command(control: &File, number: u32, request: &mut Request) -> io::Result<i32> {
    // _IOWR(0xfd, number, struct dm_ioctl)
    let code = 0xC000_0000 | ((HEADER_BYTES as u32) << 16) | (0xFD << 8) | number;
    sys::ioctl(control, code, request)
}

const BLKFLSBUF: u32 = 0x1261;

/// Forget what is cached of a block device, so that the next read asks the device itself.
pub fn forget_cache(device: &File) -> Result<(), Failure> {
    sys::ioctl_number(device, BLKFLSBUF, 0)
        .step("flush the device's buffers")
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(HEADER_BYTES, 312);
        assert_eq!(SPEC_BYTES, 40);
    }

    #[test]
    fn a_table_is_laid_out_in_steps_of_eight_bytes() {
        let mut request = request("probe");
        let target = |start| Target {
            start,
            length: 8,
            kind: "linear",
            parameters: "/dev/loop0 8".into(),
        };
        fill(&mut request, &[target(0), target(8)]);
        assert_eq!(request.header.target_count, 2);
        assert_eq!(&request.data[40..53], b"/dev/loop0 8\0");
        assert_eq!(request.data[20], 56); // next
        assert_eq!(request.data[56], 8); // the second one's start
    }
}
