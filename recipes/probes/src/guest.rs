//! The way into a guest that is booted for its probes alone: as process 1, beside the guest's own init.
//!
//! Process 1 becomes `/init`, so the guest comes up as it always does; a child waits for the console `/dev/hvc1`, says
//! `hello`, answers questions (`questions`), reads one line with the names of probes, writes their lines and `done`, and
//! has init power the guest off.

use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::questions::Questions;
use crate::{run, sys};

const CONSOLE: &str = "/dev/hvc1";
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Become `/init`, leaving a child behind that probes. Returns only when there is no `/init`.
pub fn start() {
    match unsafe { libc::fork() } {
        0 => {
            let Err(error) = serve();
            eprintln!("vz-probe: {CONSOLE}: {error}");
            power_off();
        }
        child => {
            if child < 0 {
                eprintln!("vz-probe: fork: {}", io::Error::last_os_error());
            }
            let error = Command::new("/init").exec();
            eprintln!("vz-probe: /init: {error}");
        }
    }
}

fn serve() -> io::Result<Infallible> {
    if !sys::appears(CONSOLE) {
        return Err(io::Error::other("it did not appear"));
    }
    let mut console = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(CONSOLE)?;
    make_raw(&console)?;
    writeln!(console, "hello")?;
    let mut lines = BufReader::new(console.try_clone()?);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    enter_root()?;
    // Whoever runs out of memory, the host still gets an answer; probes are as killable as anybody.
    fs::write(OOM_SCORE, "-1000")?;
    let mut questions = Questions::default();
    while let Some(answer) = questions.answer(&line) {
        writeln!(console, "{answer}")?;
        line.clear();
        lines.read_line(&mut line)?;
    }
    fs::write(OOM_SCORE, "0")?;
    let names: Vec<String> = line.split_whitespace().map(Into::into).collect();
    run::all(&names, &mut console)?;
    writeln!(console, "done")?;
    sys::check(unsafe { libc::tcdrain(console.as_raw_fd()) })?;
    power_off();
}

/// The root that init made for the agent, and its shares: /init has moved another mount over the first root, where this
/// process still is. Joining one's own mount namespace leads to the topmost.
fn enter_root() -> io::Result<()> {
    let namespace = File::open("/proc/1/ns/mnt")?;
    sys::check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) }).map(drop)
}

/// Bytes as they are: no echo, no editing, no carriage returns.
fn make_raw(console: &File) -> io::Result<()> {
    unsafe {
        let mut settings = std::mem::zeroed();
        sys::check(libc::tcgetattr(console.as_raw_fd(), &mut settings))?;
        libc::cfmakeraw(&mut settings);
        sys::check(libc::tcsetattr(console.as_raw_fd(), libc::TCSANOW, &settings))?;
    }
    Ok(())
}

/// Ask init, as busybox's poweroff does.
fn power_off() -> ! {
    unsafe {
        libc::kill(1, libc::SIGUSR2);
        loop {
            libc::pause();
        }
    }
}
