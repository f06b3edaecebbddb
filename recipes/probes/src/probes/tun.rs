//! `tun`: an interface whose packets a process reads and writes; the kernel answers an echo request sent into it.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::Ipv4Addr;

use crate::netlink::{self, Request};
use crate::outcome::{Outcome, Step, ensure};
use crate::sys;

const TUNSETIFF: u32 = 0x4004_54ca;
const IFF_TUN: u16 = 1;
const IFF_NO_PI: u16 = 0x1000;
const KERNEL: Ipv4Addr = Ipv4Addr::new(10, 88, 1, 1);
const OURS: Ipv4Addr = Ipv4Addr::new(10, 88, 1, 2);
const PAYLOAD: &[u8; 8] = b"vz-probe";
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Packets that others send into a new interface (router solicitations, say) before ours comes.
const OTHERS: usize = 64;

pub fn probe() -> Outcome {
    let _namespace = netlink::new_namespace().step("a network namespace")?;
    let mut tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .step("/dev/net/tun")?;
    let mut request = Request::new("tun0");
    request.value[..2].copy_from_slice(&(IFF_TUN | IFF_NO_PI).to_ne_bytes());
    sys::ioctl(&tun, TUNSETIFF, &mut request).step("TUNSETIFF")?;
    netlink::set_address("tun0", KERNEL).step("give tun0 an address")?;
    netlink::up("tun0").step("switch tun0 on")?;
    tun.write_all(&echo_request()).step("send a packet into tun0")?;
    for _ in 0..OTHERS {
        let mut packet = [0; 2048];
        let count = tun.read(&mut packet).step("read a packet from tun0")?;
        let packet = &packet[..count];
        if count < 36 || packet[0] != 0x45 || packet[9] != 1 {
            continue;
        }
        ensure(
            packet[12..16] == KERNEL.octets() && packet[16..20] == OURS.octets(),
            "the reply has wrong addresses",
        )?;
        ensure(
            packet[20] == ECHO_REPLY && packet[28..36] == *PAYLOAD,
            "what comes is no reply to the echo request",
        )?;
        return Ok("the kernel answers an echo request that was written into the interface".into());
    }
    Err(crate::outcome::Failure::new("no reply to the echo request"))
}

/// An IPv4 packet (RFC 791) with an ICMP echo request (RFC 792).
fn echo_request() -> Vec<u8> {
    let mut icmp = vec![ECHO_REQUEST, 0, 0, 0, 0x76, 0x7a, 0, 1];
    icmp.extend_from_slice(PAYLOAD);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let mut packet = vec![0x45, 0, 0, 20 + icmp.len() as u8, 0, 0, 0, 0, 64, 1, 0, 0];
    packet.extend_from_slice(&OURS.octets());
    packet.extend_from_slice(&KERNEL.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend(icmp);
    packet
}

/// RFC 1071, in network byte order.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_to_zero() {
        let packet = echo_request();
        assert_eq!(packet.len(), 36);
        assert_eq!(checksum(&packet[..20]), [0, 0]);
        assert_eq!(checksum(&packet[20..]), [0, 0]);
    }
}
