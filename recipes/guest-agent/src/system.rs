//! What the guest is and how it fares: processors, memory, disk, kernel, load.

use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;

use crate::AGENT_PROTOCOL_REVISION;
use crate::proto::{ResourceStatsResponse, SystemInfoResponse};

/// The guest as it is now. `disk_free_bytes` is what an unprivileged process could still write to `/`.
///
/// # Errors
/// When `/proc` is not mounted or a call fails.
pub fn info() -> io::Result<SystemInfoResponse> {
    let root = statvfs("/")?;
    let kernel = uname()?;
    let cpus = std::thread::available_parallelism()?.get();
    Ok(SystemInfoResponse {
        cpu_count: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_bytes: memory(&fs::read_to_string("/proc/meminfo")?, "MemTotal")?,
        disk_free_bytes: root.blocks_available() * root.fragment_size(),
        os_version: format!(
            "{} {}",
            kernel.sysname().to_string_lossy(),
            kernel.release().to_string_lossy()
        ),
        agent_protocol_revision: AGENT_PROTOCOL_REVISION,
    })
}

/// What is in use now. Memory in use is what could not be given to a program (`MemTotal` less `MemAvailable`); the disk
/// is the file system of `/`.
///
/// # Errors
/// When `/proc` is not mounted or a call fails.
pub fn stats(processors: &Processors) -> io::Result<ResourceStatsResponse> {
    let root = statvfs("/")?;
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let memory_total_bytes = memory(&meminfo, "MemTotal")?;
    let is_process = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
    let processes = fs::read_dir("/proc")?.flatten().filter(is_process).count();
    let load = fs::read_to_string("/proc/loadavg")?;
    Ok(ResourceStatsResponse {
        cpu_usage_percent: processors.usage_percent(Ticks::parse(&fs::read_to_string("/proc/stat")?)?),
        memory_used_bytes: memory_total_bytes.saturating_sub(memory(&meminfo, "MemAvailable")?),
        memory_total_bytes,
        disk_used_bytes: (root.blocks() - root.blocks_free()) * root.fragment_size(),
        disk_total_bytes: root.blocks() * root.fragment_size(),
        process_count: u32::try_from(processes).unwrap_or(u32::MAX),
        load_average: load.split(' ').take(3).flat_map(str::parse).collect(),
    })
}

/// What the processors did until [`stats`] was last asked.
#[derive(Default)]
pub struct Processors(Mutex<Usage>);

#[derive(Default)]
struct Usage {
    until: Ticks,
    percent: f64,
}

/// Time of all processors together since boot, in the kernel's ticks of 10 ms.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    all: u64,
}

impl Processors {
    /// Fewest ticks that say something: 0.1 s of one processor.
    const FEWEST: u64 = 10;

    /// How much of all processors' time was used, of 100, since the last call (at first since boot). When that was
    /// just now, the answer is the last one again.
    fn usage_percent(&self, now: Ticks) -> f64 {
        let mut usage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all = now.all.saturating_sub(usage.until.all);
        if all >= Self::FEWEST {
            let busy = now.busy.saturating_sub(usage.until.busy);
            // Exact: there are far fewer ticks than 2^53.
            #[allow(clippy::cast_precision_loss)]
            let percent = 100.0 * busy as f64 / all as f64;
            *usage = Usage { until: now, percent };
        }
        usage.percent
    }
}

impl Ticks {
    /// The first line of `/proc/stat` (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal, and two that
    /// user and nice hold already.
    fn parse(stat: &str) -> io::Result<Self> {
        let line = stat.lines().next().and_then(|line| line.strip_prefix("cpu "));
        let numbers: Vec<u64> = line
            .unwrap_or("")
            .split_whitespace()
            .flat_map(str::parse)
            .take(8)
            .collect();
        let [_, _, _, idle, iowait, ..] = numbers[..] else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "/proc/stat has no line of all processors",
            ));
        };
        let all: u64 = numbers.iter().sum();
        Ok(Self {
            busy: all - idle - iowait,
            all,
        })
    }
}

/// Bytes on one line of `/proc/meminfo`, which counts in KiB (proc(5)).
fn memory(meminfo: &str, name: &str) -> io::Result<u64> {
    meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(':')?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        })
        .map(|kib| kib * 1024)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/meminfo has no {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_in_bytes() {
        let text = "MemTotal:         502364 kB\nMemFree:          441212 kB\n";
        assert_eq!(memory(text, "MemTotal").unwrap(), 502_364 * 1024);
        assert_eq!(memory(text, "MemFree").unwrap(), 441_212 * 1024);
        assert!(memory(text, "Mem").is_err());
        assert!(memory(text, "MemAvailable").is_err());
    }

    #[test]
    fn usage_is_what_was_done_since_the_last_call() {
        let at = |line: &str| Ticks::parse(line).unwrap();
        let processors = Processors::default();
        let percent = |line| processors.usage_percent(at(line)).round();
        assert!((percent("cpu  10 10 10 60 10 0 0 0 5 5\ncpu0 1\n") - 30.0).abs() < 0.1);
        assert!((percent("cpu  60 10 10 60 10 0 0 0 5 5\n") - 100.0).abs() < 0.1);
        // Just now: as before.
        assert!((percent("cpu  60 10 10 65 10 0 0 0 5 5\n") - 100.0).abs() < 0.1);
        assert!((percent("cpu  60 10 10 160 10 0 0 0 5 5\n")).abs() < 0.1);
        // Steal counts as busy: the guest wanted to run.
        assert!((percent("cpu  60 10 10 190 10 0 0 10 5 5\n") - 25.0).abs() < 0.1);
        assert!(Ticks::parse("intr 1\n").is_err());
    }
}
