//! `nested_virt`: a virtual machine inside the guest runs instructions, by `/dev/kvm`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use crate::outcome::{Failure, Outcome, Step, ensure};
use crate::sys;

// linux/kvm.h and asm/kvm.h of arm64
const GET_API_VERSION: u32 = 0xAE00;
const CREATE_VM: u32 = 0xAE01;
const GET_VCPU_MMAP_SIZE: u32 = 0xAE04;
const CREATE_VCPU: u32 = 0xAE41;
const RUN: u32 = 0xAE80;
const SET_USER_MEMORY_REGION: u32 = 0x4020_AE46;
const SET_ONE_REG: u32 = 0x4010_AEAC;
const ARM_VCPU_INIT: u32 = 0x4020_AEAE;
const ARM_PREFERRED_TARGET: u32 = 0x8020_AEAF;
const REGISTER_PC: u64 = 0x6030_0000_0010_0040;
const EXIT_MMIO: u32 = 6;
const EXIT_REASON_OFFSET: usize = 8;
const MMIO_OFFSET: usize = 32;

const CODE_ADDRESS: u64 = 0x1_0000;
const OUTSIDE_MEMORY: u64 = 0x3000_0000;
/// Multiply 6 by 7 and store the product outside of memory.
const CODE: [u32; 6] = [
    0xD2A6_0001, // movz x1, #0x3000, lsl #16
    0x5280_00C2, // movz w2, #6
    0x5280_00E3, // movz w3, #7
    0x1B03_7C42, // mul w2, w2, w3
    0xB900_0022, // str w2, [x1]
    0x1400_0000, // b .
];
const PAGE: usize = 4096;

pub fn probe() -> Outcome {
    let kvm = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(file) => file,
        Err(_) if kernel_log_has("HYP mode not available") => {
            return Err(Failure::Inconclusive(
                "the machine gives the guest's kernel no EL2 to run KVM in".into(),
            ));
        }
        Err(error) => return Err(error).step("/dev/kvm"),
    };
    let version = sys::ioctl_number(&kvm, GET_API_VERSION, 0).step("KVM_GET_API_VERSION")?;
    ensure(version == 12, format!("KVM's interface is version {version}, not 12"))?;
    let vm = made(sys::ioctl_number(&kvm, CREATE_VM, 0)).step("KVM_CREATE_VM")?;

    let memory = map(-1, PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).step("memory for the machine")?;
    // Sound: a page of our own, larger than the code.
    unsafe { ptr::copy_nonoverlapping(CODE.as_ptr(), memory.cast(), CODE.len()) };
    let mut region = [0u64, CODE_ADDRESS, PAGE as u64, memory as u64]; // slot and flags, guest address, size, ours
    sys::ioctl(&vm, SET_USER_MEMORY_REGION, &mut region).step("KVM_SET_USER_MEMORY_REGION")?;

    let cpu = made(sys::ioctl_number(&vm, CREATE_VCPU, 0)).step("KVM_CREATE_VCPU")?;
    let mut target = [0u32; 8];
    sys::ioctl(&vm, ARM_PREFERRED_TARGET, &mut target).step("KVM_ARM_PREFERRED_TARGET")?;
    sys::ioctl(&cpu, ARM_VCPU_INIT, &mut target).step("KVM_ARM_VCPU_INIT")?;
    let mut address = CODE_ADDRESS;
    let mut register = [REGISTER_PC, &raw mut address as u64];
    sys::ioctl(&cpu, SET_ONE_REG, &mut register).step("KVM_SET_ONE_REG")?;

    let size = sys::ioctl_number(&kvm, GET_VCPU_MMAP_SIZE, 0).step("KVM_GET_VCPU_MMAP_SIZE")?;
    let state = map(cpu.as_raw_fd(), size as usize, libc::MAP_SHARED).step("map the processor's state")?;
    sys::ioctl_number(&cpu, RUN, 0).step("KVM_RUN")?;
    // Sound: the kernel's struct kvm_run has these fields at these places, and nobody runs the processor now.
    let (reason, written_to, value): (u32, u64, u32) = unsafe {
        (
            ptr::read_volatile(state.add(EXIT_REASON_OFFSET).cast()),
            ptr::read_volatile(state.add(MMIO_OFFSET).cast()),
            ptr::read_volatile(state.add(MMIO_OFFSET + 8).cast()),
        )
    };
    ensure(
        reason == EXIT_MMIO,
        format!("the machine left with reason {reason}, not by its store"),
    )?;
    ensure(
        written_to == OUTSIDE_MEMORY && value == 42,
        "the machine stored something else than 6 times 7",
    )?;
    Ok("a virtual machine inside the guest multiplies two numbers".into())
}

fn made(result: io::Result<i32>) -> io::Result<File> {
    Ok(unsafe { File::from_raw_fd(result?) })
}

fn map(fd: i32, length: usize, flags: i32) -> io::Result<*mut u8> {
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(address.cast())
    }
}

/// Whether a message of the kernel since its start has `text` in it.
fn kernel_log_has(text: &str) -> bool {
    let log = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = log else { return false };
    let mut record = [0; 8192];
    // One record for each read, until there is none.
    while let Ok(count @ 1..) = log.read(&mut record) {
        if String::from_utf8_lossy(&record[..count]).contains(text) {
            return true;
        }
    }
    false
}
