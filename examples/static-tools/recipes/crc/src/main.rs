//! The CRC-32 of standard input, as eight hexadecimal digits.

use std::io::{self, Read};

fn main() -> io::Result<()> {
    let mut hasher = crc32fast::Hasher::new();
    let mut input = io::stdin().lock();
    let mut part = [0; 65536];
    loop {
        match input.read(&mut part)? {
            0 => break,
            length => hasher.update(&part[..length]),
        }
    }
    println!("{:08x}", hasher.finalize());
    Ok(())
}
