//! What the agent starts itself as, to stay beside a container's process: its log, or the parent of a command in it.
//!
//! These are modes of the agent's own program, and nobody else's business: `--shim-log FILE` and
//! `--shim-exec PIDFILE PROGRAM ARGUMENT…`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Bytes of a log file; with the one before it, twice as many are kept.
pub const LOG_BYTES: usize = 512 * 1024;

/// The exit code of [`exec`] when the command did not start.
pub const NOT_STARTED: u8 = 125;

const LOG: &str = "--shim-log";
const EXEC: &str = "--shim-exec";
const PROGRAM: &str = "/proc/self/exe";

/// Runs as a shim when `arguments`, the program's own without its name, say so.
#[must_use]
pub fn run(arguments: &[OsString]) -> Option<ExitCode> {
    let (mode, rest) = arguments.split_first()?;
    match (mode.to_str()?, rest) {
        (LOG, [file]) => {
            keep(&mut io::stdin().lock(), Path::new(file), LOG_BYTES);
            Some(ExitCode::SUCCESS)
        }
        (EXEC, [pid_file, program, arguments @ ..]) => {
            let code = exec(Path::new(pid_file), program, arguments).unwrap_or_else(|error| {
                eprintln!("{}: {error}", program.display());
                NOT_STARTED
            });
            Some(ExitCode::from(code))
        }
        _ => None,
    }
}

/// A command that keeps its standard input in `file`, with `file.1` before it, until its end; it outlives the agent.
#[must_use]
pub fn log(file: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg(LOG).arg(file).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A command that runs `program`, which puts a process of its making into `pid_file` and leaves it behind, and then
/// stays that one's parent: ends as it ends, 128+N after signal N. SIGTERM, or the agent's end, kills it. When
/// `program` fails, or leaves nobody behind, `pid_file` is not there afterwards.
#[must_use]
pub fn exec_command(pid_file: &Path, program: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg(EXEC).arg(pid_file).arg(program);
    command
}

fn keep(input: &mut impl Read, path: &Path, limit: usize) {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    let mut buffer = vec![0; 16 * 1024];
    let (mut file, mut size) = (File::create(path), 0);
    while let Ok(length @ 1..) = input.read(&mut buffer) {
        if size + length > limit {
            // Where that fails the file starts over: the log stays bounded.
            let _ = fs::rename(path, &older);
            (file, size) = (File::create(path), 0);
        }
        // A container must not wait, or break, for want of a log.
        if let Ok(file) = &mut file {
            let _ = file.write_all(&buffer[..length]);
        }
        size += length;
    }
}

fn exec(pid_file: &Path, program: &OsStr, arguments: &[OsString]) -> io::Result<u8> {
    // A process that `program` leaves behind becomes a child of this one.
    set_child_subreaper(true)?;
    set_pdeathsig(Signal::SIGTERM)?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    // The standard library gives the child an empty mask again.
    let mut starter = Command::new(program).args(arguments).spawn()?;
    let mut ended: Vec<(Pid, u8)> = Vec::new();
    let (mut child, mut told_to_end) = (None, false);
    loop {
        if signals.wait()? == Signal::SIGTERM {
            told_to_end = true;
        }
        if child.is_none() {
            // Others are reaped below, once it is known which one counts.
            let Some(status) = starter.try_wait()? else { continue };
            child = left_behind(pid_file, status);
        }
        let Some(pid) = child else {
            let _ = fs::remove_file(pid_file);
            return Ok(NOT_STARTED);
        };
        if told_to_end {
            // Its number is its own for as long as it is not reaped below.
            let _ = kill(pid, Signal::SIGKILL);
        }
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match status {
                WaitStatus::Exited(pid, code) => ended.push((pid, u8::try_from(code & 0xff).unwrap_or(u8::MAX))),
                WaitStatus::Signaled(pid, signal, _) => {
                    ended.push((pid, u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)));
                }
                WaitStatus::StillAlive => break,
                _ => {}
            }
        }
        if let Some((_, code)) = ended.iter().find(|(other, _)| *other == pid) {
            return Ok(*code);
        }
        ended.clear();
    }
}

fn left_behind(pid_file: &Path, status: ExitStatus) -> Option<Pid> {
    let number = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    (status.success() && status.signal().is_none()).then(|| Pid::from_raw(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_its_end_is_kept() {
        let directory = std::env::temp_dir().join(format!("vz-shim-log-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("log");
        let text = (0..200_000)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
            .join("\n");
        keep(&mut text.as_bytes(), &path, 50_000);
        let [newer, older] = ["log", "log.1"].map(|name| fs::read_to_string(directory.join(name)).unwrap());
        assert!(newer.len() <= 50_000 && older.len() <= 50_000);
        assert!(text.ends_with(&(older + &newer)));
        fs::remove_dir_all(&directory).unwrap();
    }
}
