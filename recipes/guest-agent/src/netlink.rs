//! The few requests of rtnetlink(7) that a stack's network needs, in the network namespace of the calling thread.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use nix::libc;

// linux/if_link.h, linux/veth.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Makes what is not there, and only that.
const NEW: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;

/// A socket to the kernel. It stays in the namespace where it was opened.
pub struct Netlink(File);

impl Netlink {
    /// Opens one in the calling thread's namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        // SAFETY: no memory is passed, and the descriptor is nobody else's.
        let file = unsafe {
            let descriptor = libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_ROUTE,
            );
            if descriptor == -1 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(descriptor)
        };
        Ok(Self(file))
    }

    /// Makes a bridge with an Ethernet address of its own. Without one it would have the lowest of its ports', another
    /// one whenever they change, and its neighbours would speak to the old one for a while.
    ///
    /// # Errors
    /// What the kernel says; so for all below.
    pub fn add_bridge(&self, name: &str, ethernet: [u8; 6]) -> io::Result<()> {
        let info = attribute(IFLA_INFO_KIND, b"bridge");
        let attributes = [
            attribute(IFLA_IFNAME, &text(name)),
            attribute(IFLA_ADDRESS, &ethernet),
            attribute(IFLA_LINKINFO, &info),
        ];
        self.request(libc::RTM_NEWLINK, NEW, &[link(0, 0), attributes.concat()].concat())
    }

    /// Makes a pair of interfaces: `name` as a port of the interface with the index `bridge`, and `peer` with its Ethernet
    /// address in `elsewhere`.
    ///
    /// # Errors
    /// As above.
    pub fn add_veth(
        &self,
        name: &str,
        bridge: u32,
        (peer, ethernet): (&str, [u8; 6]),
        elsewhere: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let namespace = elsewhere.as_raw_fd().to_ne_bytes();
        let peer = [
            link(0, 0),
            attribute(IFLA_IFNAME, &text(peer)),
            attribute(IFLA_ADDRESS, &ethernet),
            attribute(IFLA_NET_NS_FD, &namespace),
        ];
        let data = attribute(VETH_INFO_PEER, &peer.concat());
        let info = [attribute(IFLA_INFO_KIND, b"veth"), attribute(IFLA_INFO_DATA, &data)];
        let attributes = [
            attribute(IFLA_IFNAME, &text(name)),
            attribute(IFLA_MASTER, &bridge.to_ne_bytes()),
            attribute(IFLA_LINKINFO, &info.concat()),
        ];
        self.request(libc::RTM_NEWLINK, NEW, &[link(0, 0), attributes.concat()].concat())
    }

    /// Removes an interface, and the other end of a pair; none of that name is no error.
    ///
    /// # Errors
    /// As above.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let body = [link(0, 0), attribute(IFLA_IFNAME, &text(name))].concat();
        match self.request(libc::RTM_DELLINK, 0, &body) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Switches an interface on, under another name when one is given: both at once.
    ///
    /// # Errors
    /// As above.
    pub fn up(&self, index: u32, renamed: Option<&str>) -> io::Result<()> {
        let mut body = link(index, libc::IFF_UP as u32);
        if let Some(name) = renamed {
            body.extend(attribute(IFLA_IFNAME, &text(name)));
        }
        self.request(libc::RTM_NEWLINK, 0, &body)
    }

    /// Makes an interface a port of the interface with the index `bridge`, which it may be already.
    ///
    /// # Errors
    /// As above.
    pub fn join(&self, index: u32, bridge: u32) -> io::Result<()> {
        let master = attribute(IFLA_MASTER, &bridge.to_ne_bytes());
        self.request(libc::RTM_NEWLINK, 0, &[link(index, 0), master].concat())
    }

    /// Gives an interface an address, at once and without asking the network whether it is free.
    ///
    /// # Errors
    /// As above.
    pub fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        const IFA_ADDRESS: u16 = 1;
        const IFA_LOCAL: u16 = 2;
        const IFA_F_NODAD: u8 = 2;
        let octets = octets(address);
        // struct ifaddrmsg: family, prefix, flags, scope (everywhere), interface
        let mut body = vec![family(address), prefix, IFA_F_NODAD, 0];
        body.extend(index.to_ne_bytes());
        body.extend(attribute(IFA_LOCAL, &octets));
        body.extend(attribute(IFA_ADDRESS, &octets));
        self.request(libc::RTM_NEWADDR, NEW, &body)
    }

    /// Sends all that has no other route to `gateway`.
    ///
    /// # Errors
    /// As above.
    pub fn add_default_route(&self, index: u32, gateway: IpAddr) -> io::Result<()> {
        const RTA_OIF: u16 = 4;
        const RTA_GATEWAY: u16 = 5;
        // struct rtmsg: family, lengths of destination and source (none), TOS, table, protocol, scope, type, flags
        let mut body = vec![
            family(gateway),
            0,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_STATIC,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ];
        body.extend([0; 4]);
        body.extend(attribute(RTA_GATEWAY, &octets(gateway)));
        body.extend(attribute(RTA_OIF, &index.to_ne_bytes()));
        self.request(libc::RTM_NEWROUTE, NEW, &body)
    }

    /// Sends one request and waits for the kernel's acknowledgement.
    fn request(&self, kind: u16, flags: i32, body: &[u8]) -> io::Result<()> {
        let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags).map_err(io::Error::other)?;
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Sequence number and port: one request at a time needs none.
        message.extend([0; 8]);
        message.extend(body);
        (&self.0).write_all(&message)?;
        let mut answer = [0; 4096];
        let length = (&self.0).read(&mut answer)?;
        // struct nlmsgerr: after the header a number, 0 or a negative errno.
        let Some(code) = answer[..length].get(HEADER..HEADER + 4) else {
            return Err(io::Error::other(
                "the kernel's answer to a netlink request is cut short",
            ));
        };
        match i32::from_ne_bytes([code[0], code[1], code[2], code[3]]) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }
}

/// The index of an interface in the calling thread's namespace; `None` when there is none of that name.
#[must_use]
pub fn index(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name lives and ends with a zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

/// `struct ifinfomsg`: any family and type, the index (0: by name), flags that are set.
fn link(index: u32, flags: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(index.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message
}

/// `struct rtattr`: length and type, the value, padding to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // All values here are short.
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut attribute = length.to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

fn family(address: IpAddr) -> u8 {
    let family = match address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    u8::try_from(family).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
