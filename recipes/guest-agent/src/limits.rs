//! How many files the agent may open: more than a command may, since each command costs it four.

use std::io;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// Descriptors for the agent: some 8,000 commands and forwarded connections at once.
const WANTED: rlim_t = 65536;

/// The soft and the hard limit that the agent was started with.
static ORDINARY: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises the limit of this process, as far as the kernel lets it; to be called once, at the start.
///
/// # Errors
/// What the kernel says to a raise that needs no privilege.
pub fn raise() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let _ = ORDINARY.set((soft, hard));
    if soft >= WANTED || setrlimit(Resource::RLIMIT_NOFILE, WANTED.max(soft), WANTED.max(hard)).is_ok() {
        return Ok(());
    }
    // Only root may go beyond the hard limit.
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard.min(WANTED), hard)?)
}

/// Gives a child of the agent the limit back that the agent was started with. Only makes a system call, so it may be
/// called between fork and exec.
///
/// # Errors
/// What the kernel says.
pub fn restore() -> io::Result<()> {
    match ORDINARY.get() {
        Some(&(soft, hard)) => Ok(setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?),
        None => Ok(()),
    }
}
