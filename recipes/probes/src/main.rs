//! `vz-probe NAME…`: proves capabilities of the running kernel, one JSON line each.
//!
//! A name is a probe (`btrfs_snapshots`) or `absent:` and what must not be there (`absent:tun`). The exit code is 0
//! when every line says PROVEN, 1 when one does not, 2 for wrong usage. As process 1 (`rdinit=/sbin/vz-probe`) it
//! starts the guest's own `/init` in its place, and takes its names from the host: see `guest`.

mod absent;
mod block;
mod guest;
mod netlink;
mod outcome;
mod probes;
mod questions;
mod run;
mod sys;

use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::start();
    }
    let names: Vec<String> = std::env::args().skip(1).collect();
    if names.is_empty() || names.iter().any(|name| name.starts_with('-')) {
        eprintln!("usage: vz-probe NAME…\n  names: {}", probes::names().join(" "));
        eprintln!("         {}", absent::names().join(" "));
        return ExitCode::from(2);
    }
    match run::all(&names, &mut io::stdout()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vz-probe: {error}");
            ExitCode::FAILURE
        }
    }
}
