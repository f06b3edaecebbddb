//! Runs probes, each in a process of its own with a time limit, and writes a line of JSON for each.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::outcome::{Failure, Outcome, Probe, Step};
use crate::{absent, probes, sys};

/// A probe takes milliseconds; under emulation on a busy machine, seconds.
const LIMIT: Duration = Duration::from_secs(90);

/// Ends what a probe's process sends.
const END: u8 = 0;

/// Run the probes of these names in order and write a line for each. False when one of them is not PROVEN.
pub fn all(names: &[String], out: &mut impl Write) -> io::Result<bool> {
    let mut proven = true;
    for name in names {
        let (verdict, detail) = one(name);
        proven &= verdict == "PROVEN";
        writeln!(
            out,
            "{{\"capability\":{},\"verdict\":\"{verdict}\",\"detail\":{}}}",
            quoted(name),
            quoted(&detail)
        )?;
        out.flush()?;
    }
    Ok(proven)
}

fn one(name: &str) -> (String, String) {
    let found = match name.strip_prefix("absent:") {
        Some(what) => absent::find(what),
        None => probes::find(name),
    };
    let outcome = match found {
        Some(probe) => apart(probe),
        None => Err(Failure::Inconclusive("vz-probe has no such probe".into())),
    };
    words(outcome)
}

fn words(outcome: Outcome) -> (String, String) {
    match outcome {
        Ok(detail) => ("PROVEN".into(), detail),
        Err(Failure::Failed(detail)) => ("FAILED".into(), detail),
        Err(Failure::Inconclusive(detail)) => ("INCONCLUSIVE".into(), detail),
    }
}

/// Run `probe` in a child process with mounts of its own and an empty `/tmp`: nothing of it stays.
fn apart(probe: Probe) -> Outcome {
    let (mut reader, writer) = sys::pipe().step("pipe")?;
    // Sound: this process has one thread.
    let child = sys::check(unsafe { libc::fork() }).step("fork")?;
    if child == 0 {
        drop(reader);
        let (verdict, detail) = words(private_mounts().and_then(|()| probe()));
        let mut message = format!("{verdict}\n{detail}").into_bytes();
        message.push(END);
        let mut writer = writer;
        let sent = writer.write_all(&message);
        unsafe { libc::_exit(i32::from(sent.is_err())) };
    }
    drop(writer);
    let answer = read_message(&mut reader, Instant::now() + LIMIT);
    // Whatever it started belongs to its process group.
    unsafe { libc::kill(-child, libc::SIGKILL) };
    let mut status = 0;
    let ended = sys::check(unsafe { libc::waitpid(child, &mut status, 0) });
    match answer {
        Some(message) => match message.split_once('\n') {
            Some(("PROVEN", detail)) => Ok(detail.into()),
            Some(("INCONCLUSIVE", detail)) => Err(Failure::Inconclusive(detail.into())),
            Some((_, detail)) => Err(Failure::new(detail)),
            None => Err(Failure::new("the probe's process wrote no verdict")),
        },
        None if ended.is_ok() && libc::WIFSIGNALED(status) && libc::WTERMSIG(status) != libc::SIGKILL => {
            Err(Failure::new(format!(
                "the probe's process was ended by signal {}",
                libc::WTERMSIG(status)
            )))
        }
        None => Err(Failure::new(format!("no verdict within {} s", LIMIT.as_secs()))),
    }
}

fn private_mounts() -> Result<(), Failure> {
    unsafe { libc::setsid() };
    sys::check(unsafe { libc::unshare(libc::CLONE_NEWNS) }).step("unshare mounts")?;
    sys::mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE, "").step("make mounts private")?;
    sys::mount("tmpfs", "/tmp", "tmpfs", 0, "mode=755").step("mount a tmpfs on /tmp")
}

/// What was sent, or None when the sender ended or the time is over before the message was complete.
fn read_message(reader: &mut File, deadline: Instant) -> Option<String> {
    let mut message = Vec::new();
    let mut buffer = [0; 512];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: reader.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        if unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32) } <= 0 {
            return None;
        }
        let count = reader.read(&mut buffer).unwrap_or(0);
        if count == 0 {
            return None;
        }
        message.extend_from_slice(&buffer[..count]);
        if message.last() == Some(&END) {
            message.pop();
            return Some(String::from_utf8_lossy(&message).into_owned());
        }
    }
}

/// `text` as a JSON string (RFC 8259).
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{0}'..='\u{1f}' => write!(out, "\\u{:04x}", character as u32).expect("a string takes all"),
            _ => out.push(character),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_strings_are_escaped() {
        assert_eq!(quoted("a \"b\" \\ c\n…"), "\"a \\\"b\\\" \\\\ c\\u000a…\"");
    }

    #[test]
    fn an_unknown_name_is_not_proven() {
        let mut out = Vec::new();
        assert!(!all(&["nonsense".into(), "absent:nonsense".into()], &mut out).unwrap());
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|line| line.contains("\"verdict\":\"INCONCLUSIVE\"")));
    }
}
