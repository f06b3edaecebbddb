//! `netns`: two network namespaces talk over veth pairs and a bridge in a third.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};

use crate::netlink;
use crate::outcome::{Outcome, Step, ensure};

const ONE: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
const TWO: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
const SAID: &[u8; 14] = b"across a veth\n";

pub fn probe() -> Outcome {
    let one = netlink::new_namespace().step("a network namespace")?;
    let two = netlink::new_namespace().step("a second network namespace")?;
    let between = netlink::new_namespace().step("a third network namespace")?;
    netlink::add_bridge("bridge").step("make a bridge")?;
    netlink::add_veth("port1", "bridge", "inside", &one).step("make a veth pair")?;
    netlink::add_veth("port2", "bridge", "inside", &two).step("make a second veth pair")?;
    for name in ["bridge", "port1", "port2"] {
        netlink::up(name).step(name)?;
    }
    for (namespace, address) in [(&one, ONE), (&two, TWO)] {
        netlink::enter(namespace).step("enter the namespace")?;
        netlink::up("inside").step("the veth's other end")?;
        netlink::set_address("inside", address).step("give it an address")?;
    }
    netlink::enter(&one).step("enter the first namespace")?;
    let listener = TcpListener::bind(SocketAddrV4::new(ONE, 4000)).step("listen in the first namespace")?;
    let refused = TcpStream::connect(SocketAddrV4::new(TWO, 4000));
    ensure(refused.is_err(), "the second namespace has the first one's listener")?;
    netlink::enter(&two).step("enter the second namespace")?;
    let mut there = TcpStream::connect(SocketAddrV4::new(ONE, 4000)).step("connect to the first namespace")?;
    let (mut here, peer) = listener.accept().step("accept")?;
    ensure(peer.ip() == TWO, "the connection comes from a wrong address")?;
    there.write_all(SAID).step("send")?;
    let mut heard = [0; SAID.len()];
    here.read_exact(&mut heard).step("receive")?;
    ensure(heard == *SAID, "what arrives is not what was sent")?;
    netlink::enter(&between).step("enter the third namespace")?;
    let reached = TcpStream::connect(SocketAddrV4::new(ONE, 4000));
    ensure(reached.is_err(), "the third namespace has a route to the first")?;
    Ok("two namespaces talk TCP over veth pairs and a bridge in a third".into())
}
