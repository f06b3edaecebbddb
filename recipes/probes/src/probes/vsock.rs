//! `vsock`: the guest has an address of its own, reaches its host, and nothing inside the guest reaches the agent.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::{io, mem};

use crate::outcome::{Outcome, Step, ensure};
use crate::sys;

/// The host's port for the agent's ready line: whoever boots a bundle listens there.
const READY_PORT: u32 = 7425;
const AGENT_PORT: u32 = 7424;
const IOCTL_VM_SOCKETS_GET_LOCAL_CID: u32 = 0x7b9;
const SO_VM_SOCKETS_CONNECT_TIMEOUT: i32 = 6;

pub fn probe() -> Outcome {
    let device = File::open("/dev/vsock").step("/dev/vsock")?;
    let mut cid = 0u32;
    sys::ioctl(&device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &mut cid).step("ask for the guest's CID")?;
    ensure(
        cid > libc::VMADDR_CID_HOST && cid != libc::VMADDR_CID_ANY,
        "the guest has no CID of its own",
    )?;
    connect_to_host().step("connect to the host's port 7425")?;
    for (name, loopback) in [("CID 1", libc::VMADDR_CID_LOCAL), ("the guest's own CID", cid)] {
        let reached = connect(loopback, AGENT_PORT, 2).is_ok();
        ensure(
            !reached,
            format!("a process in the guest reaches the agent's port by {name}"),
        )?;
    }
    Ok("the host's port answers; the agent's port cannot be reached from inside".into())
}

/// A stream to the host's port for the agent's ready line.
pub fn connect_to_host() -> io::Result<OwnedFd> {
    connect(libc::VMADDR_CID_HOST, READY_PORT, 30)
}

fn connect(cid: u32, port: u32, limit_secs: i64) -> io::Result<OwnedFd> {
    let socket = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
    let limit = libc::timeval {
        tv_sec: limit_secs,
        tv_usec: 0,
    };
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    unsafe {
        sys::check(libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const limit).cast(),
            size_of_val(&limit) as u32,
        ))?;
        sys::check(libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        ))?;
    }
    Ok(socket)
}
