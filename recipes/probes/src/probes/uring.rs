//! `io_uring`: a file is read through the rings.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, io, ptr};

use crate::outcome::{Failure, Outcome, Step, ensure};
use crate::sys;

// linux/io_uring.h
#[repr(C)]
#[derive(Default)]
struct Offsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags_or_overflow: u32,
    dropped_or_cqes: u32,
    array_or_flags: u32,
    reserved: u32,
    user_address: u64,
}

#[repr(C)]
#[derive(Default)]
struct Parameters {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    thread_cpu: u32,
    thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq: Offsets,
    cq: Offsets,
}

#[repr(C)]
#[derive(Default)]
struct Submission {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    length: u32,
    operation_flags: u32,
    user_data: u64,
    rest: [u64; 3],
}

#[repr(C)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

const OFFSET_SQ_RING: i64 = 0;
const OFFSET_CQ_RING: i64 = 0x800_0000;
const OFFSET_SUBMISSIONS: i64 = 0x1000_0000;
const ENTER_GETEVENTS: u32 = 1;
const OPCODE_READ: u8 = 22;
const CONTENT: &[u8] = b"read through the rings\n";
const TAG: u64 = 0x7a76;

pub fn probe() -> Outcome {
    let mut parameters = Parameters::default();
    let setup = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut parameters) };
    let ring = unsafe { OwnedFd::from_raw_fd(sys::check(setup).step("io_uring_setup")? as i32) };
    let sq = map(
        &ring,
        parameters.sq.array_or_flags as usize + parameters.sq_entries as usize * 4,
        OFFSET_SQ_RING,
    )?;
    let cq_bytes = parameters.cq.dropped_or_cqes as usize + parameters.cq_entries as usize * size_of::<Completion>();
    let cq = map(&ring, cq_bytes, OFFSET_CQ_RING)?;
    let submissions = map(
        &ring,
        parameters.sq_entries as usize * size_of::<Submission>(),
        OFFSET_SUBMISSIONS,
    )?;

    fs::write("/tmp/file", CONTENT).step("write a file")?;
    let file = File::open("/tmp/file").step("open a file")?;
    let mut buffer = vec![0u8; CONTENT.len()];
    let submission = Submission {
        opcode: OPCODE_READ,
        fd: file.as_raw_fd(),
        address: buffer.as_mut_ptr() as u64,
        length: buffer.len() as u32,
        user_data: TAG,
        ..Submission::default()
    };
    // The rings are shared with the kernel: what it reads is written before the tail moves.
    let (completed, result, tag) = unsafe {
        ptr::write_volatile(submissions.cast(), submission);
        ptr::write_volatile(sq.add(parameters.sq.array_or_flags as usize).cast(), 0u32);
        let tail = &*sq.add(parameters.sq.tail as usize).cast::<AtomicU32>();
        tail.store(tail.load(Ordering::Relaxed) + 1, Ordering::Release);
        sys::check(libc::syscall(
            libc::SYS_io_uring_enter,
            ring.as_raw_fd(),
            1,
            1,
            ENTER_GETEVENTS,
            ptr::null::<u8>(),
            0,
        ))
        .step("io_uring_enter")?;
        let completed = (*cq.add(parameters.cq.tail as usize).cast::<AtomicU32>()).load(Ordering::Acquire);
        let completion: Completion = ptr::read_volatile(cq.add(parameters.cq.dropped_or_cqes as usize).cast());
        (completed, completion.result, completion.user_data)
    };
    ensure(completed == 1 && tag == TAG, "the read was not completed")?;
    if result < 0 {
        return Err(Failure::new(format!(
            "the read: {}",
            io::Error::from_raw_os_error(-result)
        )));
    }
    ensure(
        result as usize == CONTENT.len() && buffer == CONTENT,
        "the read gave other bytes than the file's",
    )?;
    Ok("a file is read through the rings".into())
}

fn map(ring: &OwnedFd, length: usize, offset: i64) -> Result<*mut u8, Failure> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    let address = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, ring.as_raw_fd(), offset) };
    if address == libc::MAP_FAILED {
        return Err(Failure::new(format!("map the rings: {}", io::Error::last_os_error())));
    }
    Ok(address.cast())
}
