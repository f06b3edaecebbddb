//! `device_mapper`: a linear mapping puts the sectors of a loop device into another order.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use crate::block::{Loop, Mapping, SECTOR, Target, forget_cache, numbered_file};
use crate::outcome::{Outcome, Step, ensure};

pub fn probe() -> Outcome {
    let file = numbered_file("/tmp/disk", 16)?;
    let disk = Loop::over(&file)?;
    let linear = |start, from| Target {
        start,
        length: 8,
        kind: "linear",
        parameters: format!("{} {from}", disk.path),
    };
    let mapping = Mapping::new("vz-probe-linear", &[linear(0, 8), linear(8, 0)])?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&mapping.path)
        .step("open the mapped device")?;
    let mut sectors = vec![0; 16 * SECTOR];
    device.read_exact_at(&mut sectors, 0).step("read the mapped device")?;
    for (number, sector) in (0u8..).zip(sectors.chunks(SECTOR)) {
        let from = (number + 8) % 16 + 1;
        ensure(
            sector.iter().all(|byte| *byte == from),
            "the mapped device gives sectors in a wrong order",
        )?;
    }
    device
        .write_all_at(&[0xEE; 8 * SECTOR], 0)
        .step("write to the mapped device")?;
    device.sync_all().step("fsync the mapped device")?;
    forget_cache(&device)?;
    drop(device);
    let mut behind = vec![0; 16 * SECTOR];
    file.read_exact_at(&mut behind, 0).step("read the backing file")?;
    ensure(
        behind[8 * SECTOR..].iter().all(|byte| *byte == 0xEE),
        "a write did not reach the backing file's sectors",
    )?;
    ensure(
        behind[..SECTOR] == [1; SECTOR],
        "a write reached sectors that it was not for",
    )?;
    Ok("a linear mapping of two segments reads and writes a loop device through".into())
}
