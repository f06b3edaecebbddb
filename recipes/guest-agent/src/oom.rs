//! Whom the kernel ends when memory runs out: the agent after everybody else, since nobody would hear of the end of a
//! container, or could delete one, without it.

use std::ffi::CStr;
use std::io;
use std::sync::OnceLock;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::write;

const SCORE: &CStr = c"/proc/self/oom_score_adj";

/// One more than never (proc(5)): where nothing else is left, the agent ends and is started again.
const LAST: &[u8] = b"-999";

/// What the agent was started with.
static ORDINARY: OnceLock<Vec<u8>> = OnceLock::new();

/// Makes this process the last one; to be called once, at the start. Only root may.
///
/// # Errors
/// What the kernel says.
pub fn protect() -> io::Result<()> {
    let before = std::fs::read("/proc/self/oom_score_adj")?;
    set(LAST)?;
    let _ = ORDINARY.set(before);
    Ok(())
}

/// Gives a child of the agent back what the agent was started with. Only makes system calls, so it may be called
/// between fork and exec.
///
/// # Errors
/// What the kernel says.
pub fn restore() -> io::Result<()> {
    ORDINARY.get().map_or(Ok(()), |before| set(before))
}

fn set(score: &[u8]) -> io::Result<()> {
    let file = open(SCORE, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(file, score)?;
    Ok(())
}
