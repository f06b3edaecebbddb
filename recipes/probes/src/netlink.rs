//! Network interfaces: links made by rtnetlink(7), addresses and flags set by netdevice(7).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys;

// linux/if_link.h, linux/veth.h
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
/// `struct ifinfomsg`: any family, no index.
const INFO: [u8; 16] = [0; 16];
const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;

/// Make a bridge.
pub fn add_bridge(name: &str) -> io::Result<()> {
    let kind = attribute(IFLA_INFO_KIND, b"bridge");
    new_link(&[attribute(IFLA_IFNAME, &text(name)), attribute(IFLA_LINKINFO, &kind)].concat())
}

/// Make a pair of interfaces: `name` as a port of `bridge` here, `peer` in the network namespace `elsewhere`.
pub fn add_veth(name: &str, bridge: &str, peer: &str, elsewhere: &File) -> io::Result<()> {
    let namespace = elsewhere.as_raw_fd().to_ne_bytes();
    let other = [
        INFO.to_vec(),
        attribute(IFLA_IFNAME, &text(peer)),
        attribute(IFLA_NET_NS_FD, &namespace),
    ]
    .concat();
    let data = attribute(VETH_INFO_PEER, &other);
    let info = [attribute(IFLA_INFO_KIND, b"veth"), attribute(IFLA_INFO_DATA, &data)].concat();
    new_link(
        &[
            attribute(IFLA_IFNAME, &text(name)),
            attribute(IFLA_MASTER, &index(bridge)?.to_ne_bytes()),
            attribute(IFLA_LINKINFO, &info),
        ]
        .concat(),
    )
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

/// Length and type, the value, padding to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut out = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn new_link(attributes: &[u8]) -> io::Result<()> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let length = (HEADER_BYTES + INFO.len() + attributes.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence and port
    message.extend_from_slice(&INFO);
    message.extend_from_slice(attributes);

    let mut socket = File::from(sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?);
    socket.write_all(&message)?;
    let mut answer = [0; 4096];
    let count = socket.read(&mut answer)?;
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    if count < HEADER_BYTES + 4 || kind != NLMSG_ERROR {
        return Err(io::Error::other("the kernel did not acknowledge the link"));
    }
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// `struct ifreq`: a name and a union of 24 bytes.
#[repr(C, align(8))]
pub struct Request {
    name: [u8; 16],
    /// The union.
    pub value: [u8; 24],
}

impl Request {
    /// About the interface `name`.
    pub fn new(name: &str) -> Self {
        let mut request = Self {
            name: [0; 16],
            value: [0; 24],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request
    }
}

fn index(name: &str) -> io::Result<i32> {
    let mut request = Request::new(name);
    sys::ioctl(&ip_socket()?, libc::SIOCGIFINDEX as u32, &mut request)?;
    Ok(i32::from_ne_bytes([
        request.value[0],
        request.value[1],
        request.value[2],
        request.value[3],
    ]))
}

/// Switch an interface on.
pub fn up(name: &str) -> io::Result<()> {
    let mut request = Request::new(name);
    request.value[..2].copy_from_slice(&(libc::IFF_UP as u16).to_ne_bytes());
    sys::ioctl(&ip_socket()?, libc::SIOCSIFFLAGS as u32, &mut request).map(drop)
}

/// Give an interface this address in a network of 256.
pub fn set_address(name: &str, address: Ipv4Addr) -> io::Result<()> {
    let socket = ip_socket()?;
    for (command, value) in [
        (libc::SIOCSIFADDR, address),
        (libc::SIOCSIFNETMASK, Ipv4Addr::new(255, 255, 255, 0)),
    ] {
        let mut request = Request::new(name);
        request.value[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        request.value[4..8].copy_from_slice(&value.octets());
        sys::ioctl(&socket, command as u32, &mut request)?;
    }
    Ok(())
}

fn ip_socket() -> io::Result<OwnedFd> {
    sys::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)
}

/// Move to a new network namespace; its handle.
pub fn new_namespace() -> io::Result<File> {
    sys::check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    File::open("/proc/thread-self/ns/net")
}

/// Move to a network namespace.
pub fn enter(namespace: &File) -> io::Result<()> {
    sys::check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(
            attribute(IFLA_IFNAME, b"br0\0x"),
            [9, 0, 3, 0, b'b', b'r', b'0', 0, b'x', 0, 0, 0]
        );
        assert_eq!(size_of::<Request>(), 40);
    }
}
