//! Starts one command: as whom, where, with which environment, on pipes or on a terminal of its own.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::pty::{Winsize, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;
use nix::unistd::{Uid, chdir, fchown, pipe2, setsid};
use tokio::process::{Child, Command};

use crate::channel::Channel;
use crate::limits;
use crate::oom;
use crate::proto::ExecRequest;
use crate::user::User;

/// Where commands are looked for when the request's environment has no `PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a terminal calls itself when the request's environment has no `TERM`.
const TERM: &str = "xterm-256color";

/// Rows and columns of a terminal whose request names none.
const SIZE: (u16, u16) = (24, 80);

/// A command that runs, and the agent's ends of its streams.
pub struct Started {
    /// The process, the leader of a process group of its own; with a terminal, of a session.
    pub child: Child,
    /// What it reads and writes.
    pub streams: Streams,
}

/// The agent's ends.
pub enum Streams {
    /// One pipe each.
    Pipes {
        /// Written by the agent.
        stdin: Channel,
        /// Read by the agent.
        stdout: Channel,
        /// Read by the agent.
        stderr: Channel,
    },
    /// One terminal for all three.
    Terminal(Arc<Channel>),
}

/// The streams' other ends.
struct Theirs {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// Starts what `request` says. Waits for as long as a share that nobody serves keeps it waiting, so it is not to be called
/// on the agent's own thread; the command ends with the thread that called it.
///
/// # Errors
/// A sentence for the client: no such command, user or directory, or what else keeps it from starting.
pub fn start(request: &ExecRequest) -> Result<Started, String> {
    let user = User::find(&request.user)?;
    let failed = |error: io::Error| format!("{:?} could not start: {error}", request.command);
    let (streams, theirs) = if request.allocate_pty {
        terminal(request, &user)
    } else {
        pipes()
    }
    .map_err(failed)?;
    let mut command = Command::new(&request.command);
    command
        // For one that starts when nobody waits for it any more.
        .kill_on_drop(true)
        .args(&request.args)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", &user.home)
        .env("USER", &user.name)
        .env("LOGNAME", &user.name)
        .env("SHELL", &user.shell)
        .stdin(Stdio::from(theirs.stdin))
        .stdout(Stdio::from(theirs.stdout))
        .stderr(Stdio::from(theirs.stderr));
    if request.allocate_pty {
        command.env("TERM", TERM);
    }
    command.envs(&request.env);
    if !request.working_dir.is_empty() {
        // Without this the kernel's answer is the same as for a command that is not there.
        if !Path::new(&request.working_dir).is_dir() {
            return Err(format!("{:?} is not a directory in the guest", request.working_dir));
        }
        command.current_dir(&request.working_dir);
    }
    let assume = (!request.user.is_empty()).then(|| user.assume());
    let home = (!request.user.is_empty() && request.working_dir.is_empty()).then_some(user.home);
    prepare(&mut command, request.allocate_pty, assume, home);
    let child = command.spawn().map_err(failed)?;
    Ok(Started { child, streams })
}

/// What happens between fork and exec. A command starts in `home`, when that is given, as a login does.
fn prepare(
    command: &mut Command,
    on_terminal: bool,
    mut assume: Option<impl FnMut() -> io::Result<()> + Send + Sync + 'static>,
    home: Option<String>,
) {
    // What is no path, with a zero in it, is no directory either.
    let home = home.map(|home| CString::new(home).unwrap_or_default());
    if !on_terminal {
        command.process_group(0);
    }
    let between = move || {
        if on_terminal {
            setsid()?;
            // SAFETY: no memory is passed. Descriptor 0 is the terminal, which now controls the new session.
            if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        start_over()?;
        if let Some(assume) = &mut assume {
            assume()?;
        }
        // As the user, since a home may be closed to others.
        if let Some(home) = &home
            && chdir(home.as_c_str()).is_err()
        {
            chdir(c"/")?;
        }
        // Nobody could read a command's output any more, or end it, once its agent is gone. After `assume`, since
        // the kernel forgets this with a change of user.
        set_pdeathsig(Signal::SIGKILL)?;
        Ok(())
    };
    // SAFETY: the function only makes system calls, on data made before the fork.
    unsafe { command.pre_exec(between) };
}

/// Between fork and exec: takes back what a child of the agent must not inherit. Only makes system calls.
///
/// # Errors
/// What the kernel says.
pub fn start_over() -> io::Result<()> {
    // First: with the ordinary limit of files none may be opened here while the agent has more.
    oom::restore()?;
    limits::restore()?;
    // The shell that started the agent in its background made it ignore some.
    for number in Signal::iterator() {
        // SAFETY: the default handler runs no code of ours. Two signals have no other one, which is an error.
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
    }
    Ok(())
}

fn pipes() -> io::Result<(Streams, Theirs)> {
    let (stdin, ours_in) = pipe2(OFlag::O_CLOEXEC)?;
    let (ours_out, stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (ours_err, stderr) = pipe2(OFlag::O_CLOEXEC)?;
    let streams = Streams::Pipes {
        stdin: Channel::new(ours_in)?,
        stdout: Channel::new(ours_out)?,
        stderr: Channel::new(ours_err)?,
    };
    let theirs = Theirs { stdin, stdout, stderr };
    Ok((streams, theirs))
}

fn terminal(request: &ExecRequest, user: &User) -> io::Result<(Streams, Theirs)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = open(ptsname_r(&master)?.as_str(), flags, Mode::empty())?;
    let size = winsize(request.term_rows, request.term_cols).unwrap_or_else(|| window(SIZE.0, SIZE.1));
    set_size(master.as_raw_fd(), &size)?;
    if !request.user.is_empty() {
        // As login does: a program may open its terminal by name. Where it is not allowed, `assume` will not be either.
        let _ = fchown(&slave, Some(Uid::from_raw(user.uid)), None);
    }
    let theirs = Theirs {
        stdin: slave.try_clone()?,
        stdout: slave.try_clone()?,
        stderr: slave,
    };
    Ok((
        Streams::Terminal(Arc::new(Channel::new(OwnedFd::from(master))?)),
        theirs,
    ))
}

/// Gives the terminal another size; the kernel then sends SIGWINCH to its foreground process group.
///
/// # Errors
/// What the kernel says.
pub fn resize(terminal: &Channel, rows: u16, cols: u16) -> io::Result<()> {
    set_size(terminal.as_fd().as_raw_fd(), &window(rows, cols))
}

fn set_size(terminal: RawFd, size: &Winsize) -> io::Result<()> {
    // SAFETY: the kernel reads one Winsize, and keeps no pointer.
    match unsafe { libc::ioctl(terminal, libc::TIOCSWINSZ, &raw const *size) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn window(rows: u16, cols: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// The size asked for, `None` when a side is 0.
fn winsize(rows: u32, cols: u32) -> Option<Winsize> {
    let side = |length: u32| u16::try_from(length).ok().filter(|length| *length > 0);
    Some(window(side(rows)?, side(cols)?))
}
