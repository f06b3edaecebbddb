//! What the guest is: processors, memory, disk, kernel.

use std::fs;
use std::io;

use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;

use crate::AGENT_PROTOCOL_REVISION;
use crate::proto::SystemInfoResponse;

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
        memory_bytes: memory_total(&fs::read_to_string("/proc/meminfo")?)?,
        disk_free_bytes: root.blocks_available() * root.fragment_size(),
        os_version: format!(
            "{} {}",
            kernel.sysname().to_string_lossy(),
            kernel.release().to_string_lossy()
        ),
        agent_protocol_revision: AGENT_PROTOCOL_REVISION,
    })
}

/// Bytes on the `MemTotal` line of `/proc/meminfo`, which counts in KiB (proc(5)).
fn memory_total(meminfo: &str) -> io::Result<u64> {
    meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        })
        .map(|kib| kib * 1024)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo has no MemTotal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_in_bytes() {
        let text = "MemTotal:         502364 kB\nMemFree:          441212 kB\n";
        assert_eq!(memory_total(text).unwrap(), 502_364 * 1024);
        assert!(memory_total("MemFree: 1 kB\n").is_err());
    }
}
