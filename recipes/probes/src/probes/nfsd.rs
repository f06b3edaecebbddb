//! `nfsd`: a directory is exported by the kernel's NFS 4 server; a call over TCP finds its file and reads it.
//!
//! There is no `mountd`: what it would answer (who a client is, what is exported, which file handle is the root) is
//! written into the kernel's caches beforehand. All of it happens in a network namespace, with a server of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use crate::netlink;
use crate::outcome::{Failure, Outcome, Step, ensure};
use crate::sys;

const CONTENT: &[u8] = b"served by the kernel\n";
/// In the year 2038; the caches want a time at which an entry ends.
const NEVER: u32 = i32::MAX as u32;
/// Has a number (the root is 0), no subtree check, any port may ask, read-only: `NFSEXP_…` of linux/nfsd/export.h.
const EXPORT_FLAGS: u32 = 0x2000 | 0x400 | 0x2 | 0x1;

pub fn probe() -> Outcome {
    let _namespace = netlink::new_namespace().step("a network namespace")?;
    netlink::up("lo").step("switch lo on")?;
    fs::create_dir("/tmp/export")
        .and(fs::create_dir("/tmp/nfsd"))
        .step("mkdir")?;
    fs::write("/tmp/export/file", CONTENT).step("write a file")?;
    sys::mount("nfsd", "/tmp/nfsd", "nfsd", 0, "").step("mount nfsd")?;
    // Version 3 would be registered with a port mapper, which nobody runs here.
    let settings = [
        ("versions", "-3 +4\n"),
        ("nfsv4gracetime", "10\n"),
        ("portlist", "tcp 2049\n"),
    ];
    for (name, value) in settings {
        write(&format!("/tmp/nfsd/{name}"), value)?;
    }
    cache("auth.unix.ip", &format!("nfsd 127.0.0.1 {NEVER} vz-probe\n"))?;
    cache(
        "nfsd.export",
        &format!("vz-probe /tmp/export {NEVER} {EXPORT_FLAGS} 65534 65534 0\n"),
    )?;
    cache("nfsd.fh", &format!("vz-probe 1 \\x00000000 {NEVER} /tmp/export\n"))?;
    write("/tmp/nfsd/threads", "1\n")?;
    let outcome = ask();
    write("/tmp/nfsd/threads", "0\n")?;
    outcome
}

fn write(path: &str, text: &str) -> Result<(), Failure> {
    // One write(2), as these files want it.
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .step(path)
}

fn cache(name: &str, line: &str) -> Result<(), Failure> {
    write(&format!("/proc/net/rpc/{name}/channel"), line)
}

fn ask() -> Outcome {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 2049)).step("connect to the server")?;
    call(&mut stream, 0, &[])?; // NULL

    // RFC 7530: COMPOUND of PUTROOTFH, LOOKUP "file", GETATTR (type, size), READ with the special stateid of all ones.
    let mut compound = Xdr::default();
    compound.opaque(b"").word(0).word(4);
    compound.word(24);
    compound.word(15).opaque(b"file");
    compound.word(9).word(1).word((1 << 1) | (1 << 4));
    compound
        .word(25)
        .word(u32::MAX)
        .word(u32::MAX)
        .word(u32::MAX)
        .word(u32::MAX)
        .word(0)
        .word(0)
        .word(1024);
    let answer = call(&mut stream, 1, &compound.0)?;

    let mut answer = Reader(&answer);
    let status = answer.word()?;
    ensure(
        status == 0,
        format!("the server answers with the NFSv4 status {status}"),
    )?;
    answer.opaque()?; // tag
    answer.expect(4, "results")?;
    answer.expect(24, "PUTROOTFH")?.expect(0, "its status")?;
    answer.expect(15, "LOOKUP")?.expect(0, "its status")?;
    answer.expect(9, "GETATTR")?.expect(0, "its status")?;
    answer
        .expect(1, "attribute words")?
        .expect((1 << 1) | (1 << 4), "attributes")?;
    answer.expect(12, "bytes of attributes")?.expect(1, "a regular file")?;
    answer.expect(0, "size")?.expect(CONTENT.len() as u32, "size")?;
    answer.expect(25, "READ")?.expect(0, "its status")?;
    answer.expect(1, "end of file")?;
    ensure(
        answer.opaque()? == CONTENT,
        "the server gives other bytes than the file's",
    )?;
    Ok("an exported directory's file is found and read over NFSv4".into())
}

/// ONC RPC (RFC 5531) to program 100003 version 4 as root, in one record over TCP; the results.
fn call(stream: &mut TcpStream, procedure: u32, arguments: &[u8]) -> Result<Vec<u8>, Failure> {
    const XID: u32 = 0x767a;
    let mut message = Xdr::default();
    message.word(XID).word(0).word(2).word(100_003).word(4).word(procedure);
    // AUTH_SYS: stamp, machine name, uid, gid, no further groups; no verifier.
    message
        .word(1)
        .word(20)
        .word(0)
        .word(0)
        .word(0)
        .word(0)
        .word(0)
        .word(0)
        .word(0);
    message.0.extend_from_slice(arguments);
    let mut record = ((message.0.len() as u32) | 1 << 31).to_be_bytes().to_vec();
    record.extend(message.0);
    stream.write_all(&record).step("call the server")?;

    let mut length = [0; 4];
    stream.read_exact(&mut length).step("the server's answer")?;
    let length = u32::from_be_bytes(length);
    ensure(
        length & 1 << 31 != 0 && length & !(1 << 31) < 1 << 16,
        "the server's answer is not one short record",
    )?;
    let mut answer = vec![0; (length & !(1 << 31)) as usize];
    stream.read_exact(&mut answer).step("the server's answer")?;
    let mut reader = Reader(&answer);
    reader
        .expect(XID, "the call's number")?
        .expect(1, "a reply")?
        .expect(0, "an accepted call")?;
    reader.word()?; // verifier
    reader.opaque()?;
    reader.expect(0, "success")?;
    Ok(reader.0.to_vec())
}

/// Values in XDR (RFC 4506).
#[derive(Default)]
struct Xdr(Vec<u8>);

impl Xdr {
    fn word(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    fn opaque(&mut self, bytes: &[u8]) -> &mut Self {
        self.word(bytes.len() as u32);
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn word(&mut self) -> Result<u32, Failure> {
        let (word, rest) = self
            .0
            .split_first_chunk()
            .ok_or_else(|| Failure::new("the answer is too short"))?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*word))
    }

    fn opaque(&mut self) -> Result<&'a [u8], Failure> {
        let length = self.word()? as usize;
        let padded = length.next_multiple_of(4);
        ensure(padded <= self.0.len(), "the answer is too short")?;
        let (bytes, rest) = self.0.split_at(padded);
        self.0 = rest;
        Ok(&bytes[..length])
    }

    fn expect(&mut self, value: u32, what: &str) -> Result<&mut Self, Failure> {
        let found = self.word()?;
        ensure(
            found == value,
            format!("the server's answer has {found} for {what}, wanted {value}"),
        )?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdr_is_read_as_it_is_written() {
        let mut xdr = Xdr::default();
        xdr.word(7).opaque(b"file").opaque(b"five5");
        assert_eq!(xdr.0.len(), 4 + 8 + 12);
        let mut reader = Reader(&xdr.0);
        assert!(reader.expect(7, "seven").is_ok());
        assert_eq!(reader.opaque().unwrap(), b"file");
        assert_eq!(reader.opaque().unwrap(), b"five5");
        assert!(reader.word().is_err());
    }
}
