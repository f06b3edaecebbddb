//! `dm_crypt`: what is written through a mapping lies on the backing file as AES-256-XTS, and reads back as it was.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use crate::block::{Loop, Mapping, SECTOR, Target, forget_cache, numbered_file};
use crate::outcome::{Outcome, Step, ensure};

const PLAIN: u8 = 0x5a;

/// For each sector the first two cipher blocks and the last of AES-256-XTS (IEEE 1619) under the key 00 01 … 3f, the
/// sector's number as the tweak, over 512 bytes of `PLAIN`; computed with another implementation (OpenSSL).
const EXPECTED: [(&str, &str); 2] = [
    (
        "31a029ae0c7dd86950175da6af2a1b245170331ec1757d5511f9a2ef04f0c0f9",
        "3d1daab662bd5e4cb926c5dd655114ed",
    ),
    (
        "f7fc6e9de5da65bc11437d368c7dee99f8794fb3b4cf569010eb52ad939651cd",
        "ab2793900e6b7a84ef19685429d729e9",
    ),
];

pub fn probe() -> Outcome {
    let file = numbered_file("/tmp/disk", 2)?;
    let disk = Loop::over(&file)?;
    let key: Vec<u8> = (0..64).collect();
    let table = [Target {
        start: 0,
        length: 2,
        kind: "crypt",
        parameters: format!("aes-xts-plain64 {} 0 {} 0", hex(&key), disk.path),
    }];
    let plain = [PLAIN; 2 * SECTOR];
    let mapping = Mapping::new("vz-probe-crypt", &table)?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&mapping.path)
        .step("open the mapped device")?;
    device.write_all_at(&plain, 0).step("write plaintext")?;
    device.sync_all().step("fsync the mapped device")?;

    let mut behind = [0; 2 * SECTOR];
    file.read_exact_at(&mut behind, 0).step("read the backing file")?;
    ensure(behind != plain, "the plaintext lies on the backing file")?;
    for (sector, (head, tail)) in behind.chunks(SECTOR).zip(EXPECTED) {
        let found = (hex(&sector[..32]), hex(&sector[SECTOR - 16..]));
        ensure(
            found.0 == head && found.1 == tail,
            "the backing file does not hold AES-256-XTS of the plaintext",
        )?;
    }

    forget_cache(&device)?;
    let mut read = [0; 2 * SECTOR];
    device.read_exact_at(&mut read, 0).step("read the mapped device")?;
    ensure(read == plain, "the mapped device does not give the plaintext back")?;
    drop(device);
    Ok("the backing file holds AES-256-XTS of the plaintext, which reads back".into())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes all");
        text
    })
}
