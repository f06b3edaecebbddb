//! What the host asks a guest whose memory it takes, and whose state it saves and restores (`state.py`): a line each
//! on the console, answered by a line. Between two questions the guest may have become another machine's.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;

use crate::{probes, sys};

/// The answers, and what is held between them.
#[derive(Default)]
pub struct Questions {
    filled: Vec<u8>,
    stream: Option<fs::File>,
}

const MIB: usize = 1 << 20;

/// Bytes of a draw of random numbers; the kernel's generator makes one key of each, and the next from it, so two guests
/// that go on from one key draw the same in the end, also when one is a few draws ahead.
const DRAW: usize = 32;

impl Questions {
    /// The answer to `line`, or None when that is no question. A question that fails is answered with the error.
    pub fn answer(&mut self, line: &str) -> Option<String> {
        let mut words = line.split_whitespace();
        if words.next() != Some("ask") {
            return None;
        }
        let question = words.next().unwrap_or("");
        let number = || {
            line.split_whitespace()
                .nth(2)
                .and_then(|word| word.parse().ok())
                .unwrap_or(1)
        };
        let answer = match question {
            "memory" => memory(),
            "balloon" => Ok(fs::exists("/sys/bus/virtio/drivers/virtio_balloon")
                .is_ok_and(|is| is)
                .to_string()),
            "fill" => {
                self.filled = vec![1; number() * MIB];
                Ok("filled".into())
            }
            "free" => {
                self.filled = Vec::new();
                Ok("freed".into())
            }
            "random" => random(number()),
            "clock" => clock(),
            "connect" => self.connect(),
            "stream" => self.stream(),
            "runs" => runs(line.split_once("runs ").map_or("", |(_, what)| what.trim())),
            _ => Err(io::Error::other("there is no such question")),
        };
        Some(answer.unwrap_or_else(|error| format!("error: {error}")))
    }

    /// Open a stream to the host and say something on it.
    fn connect(&mut self) -> io::Result<String> {
        let mut stream = fs::File::from(probes::connect_to_host()?);
        stream.write_all(b"held\n")?;
        self.stream = Some(stream);
        Ok("connected".into())
    }

    /// How the stream is: `open`, `ended`, or the error that it ended with.
    fn stream(&self) -> io::Result<String> {
        let Some(stream) = &self.stream else {
            return Err(io::Error::other("there is no stream"));
        };
        let mut byte = 0u8;
        let read = unsafe { libc::recv(stream.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT) };
        match sys::check(read) {
            Ok(0) => Ok("ended".into()),
            Ok(_) => Ok("open".into()),
            Err(error) => Ok(match error.raw_os_error() {
                Some(libc::EAGAIN) => "open".into(),
                // The vsock gives the latter to whoever reads after the former.
                Some(libc::ECONNRESET | libc::ENOTCONN) => "reset".into(),
                _ => format!("error: {error}"),
            }),
        }
    }
}

/// `MemTotal` and `MemAvailable`, in KiB.
fn memory() -> io::Result<String> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let number = |name| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.split_whitespace().next())
            .ok_or_else(|| io::Error::other(format!("/proc/meminfo has no {name}")))
    };
    Ok(format!("{} {}", number("MemTotal:")?, number("MemAvailable:")?))
}

/// `draws` draws from the kernel's generator, in hexadecimal. The C library's own getrandom may keep numbers in store.
fn random(draws: usize) -> io::Result<String> {
    let mut words = Vec::new();
    for _ in 0..draws {
        let mut bytes = [0u8; DRAW];
        sys::check(unsafe { libc::syscall(libc::SYS_getrandom, bytes.as_mut_ptr(), DRAW, 0) })?;
        words.push(bytes.iter().fold(String::new(), |mut word, byte| {
            write!(word, "{byte:02x}").expect("a string takes all");
            word
        }));
    }
    Ok(words.join(" "))
}

/// Seconds since 1970.
fn clock() -> io::Result<String> {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_err(io::Error::other)?;
    Ok(format!("{}.{:09}", now.as_secs(), now.subsec_nanos()))
}

/// How many processes have this command line, words joined by blanks.
fn runs(command: &str) -> io::Result<String> {
    let count = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).replace('\0', " ").trim_end() == command)
        .count();
    Ok(count.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_question_is_answered() {
        let mut questions = Questions::default();
        assert_eq!(questions.answer("vsock virtiofs"), None);
        assert_eq!(questions.answer(""), None);
        assert!(questions.answer("ask nonsense").unwrap().starts_with("error: "));
        assert!(questions.answer("ask stream").unwrap().starts_with("error: "));
    }

    #[test]
    fn answers_are_numbers() {
        let mut questions = Questions::default();
        let mut ask = |line: &str| questions.answer(line).unwrap();
        let memory: Vec<u64> = ask("ask memory").split(' ').map(|word| word.parse().unwrap()).collect();
        assert!(memory[0] > memory[1]);
        assert!(ask("ask clock").parse::<f64>().unwrap() > 1.7e9);
        let answer = ask("ask random 3");
        let draws: Vec<&str> = answer.split(' ').collect();
        assert_eq!(draws.len(), 3);
        assert!(draws.iter().all(|draw| draw.len() == 2 * DRAW));
        assert_eq!((ask("ask fill 2"), ask("ask free")), ("filled".into(), "freed".into()));
        assert_eq!(ask("ask runs no such program"), "0");
    }
}
