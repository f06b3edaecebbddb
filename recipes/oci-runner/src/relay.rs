//! Carries bytes between our own terminal, or whatever our standard streams are, and the container's terminal.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{read, write};

const CHUNK: usize = 16 * 1024;

/// How long the output that is left of an ended process may take to come, in ms: it is there, or never comes.
const REST_MS: u16 = 100;

/// The container's terminal and ours, which is raw meanwhile.
pub struct Relay {
    master: OwnedFd,
    /// What was typed and not taken yet. Writing never blocks: the container may wait for us to read first.
    pending: Vec<u8>,
    typing: bool,
    printing: bool,
    before: Option<Termios>,
}

impl Relay {
    /// Take the terminal that youki sends over the socket, and give it our size.
    pub fn accept(listener: &UnixListener) -> Result<Self, String> {
        let master = received(listener)?;
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            tcsetattr(&stdin, SetArg::TCSANOW, &raw).map_err(|error| format!("our terminal: {error}"))?;
        }
        fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|error| format!("the terminal: {error}"))?;
        let relay = Self {
            master,
            pending: Vec::new(),
            typing: true,
            printing: true,
            before,
        };
        relay.resize();
        Ok(relay)
    }

    /// Make the container's terminal as large as ours.
    pub fn resize(&self) {
        let mut size = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: both requests take a pointer to a winsize, which outlives them.
        unsafe {
            if libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) == 0 {
                libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size);
            }
        }
    }

    /// What to wait for. An end that is over is left out: it would be ready for ever.
    pub fn waits(&self) -> Vec<PollFd<'_>> {
        let mut waits = Vec::new();
        if self.printing {
            let out = if self.pending.is_empty() {
                PollFlags::empty()
            } else {
                PollFlags::POLLOUT
            };
            waits.push(PollFd::new(self.master.as_fd(), PollFlags::POLLIN | out));
        }
        if self.typing && self.pending.is_empty() {
            // SAFETY: standard input stays open as long as the process lives.
            let stdin = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
            waits.push(PollFd::new(stdin, PollFlags::POLLIN));
        }
        waits
    }

    /// Carry what is there; `ready` says which of `waits` have something.
    pub fn carry(&mut self, ready: &[bool]) {
        let mut ready = ready.iter().copied();
        let mut bytes = [0; CHUNK];
        let master = self.printing && ready.next() == Some(true);
        let stdin = self.typing && self.pending.is_empty() && ready.next() == Some(true);
        if master {
            self.print(&mut bytes);
        }
        if stdin {
            match read(std::io::stdin(), &mut bytes) {
                Ok(0) | Err(Errno::EIO) => self.typing = false,
                Ok(count) => self.pending.extend_from_slice(&bytes[..count]),
                Err(_) => {}
            }
        }
        match write(&self.master, &self.pending) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => (self.typing, self.pending) = (false, Vec::new()),
        }
    }

    /// Print what an ended process left.
    pub fn drain(&mut self) {
        let mut bytes = [0; CHUNK];
        while self.printing {
            let mut waits = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waits, PollTimeout::from(REST_MS)) {
                Ok(0) | Err(_) => return,
                Ok(_) => self.print(&mut bytes),
            }
        }
    }

    fn print(&mut self, bytes: &mut [u8]) {
        match read(&self.master, bytes) {
            // EIO: the last process that had the terminal open closed it.
            Ok(0) | Err(Errno::EIO) => self.printing = false,
            Ok(count) => self.printing = put(std::io::stdout(), &bytes[..count]),
            Err(_) => {}
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Write all of it; whether somebody takes it.
fn put(sink: impl AsFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match write(&sink, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}

/// The terminal's master end, which youki sends with the first message of a connection.
fn received(listener: &UnixListener) -> Result<OwnedFd, String> {
    let (stream, _) = listener
        .accept()
        .map_err(|error| format!("the console socket: {error}"))?;
    let mut name = [0; 256];
    let mut space = nix::cmsg_space!([libc::c_int; 1]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .map_err(|error| format!("the console socket: {error}"))?;
    for control in message
        .cmsgs()
        .map_err(|error| format!("the console socket: {error}"))?
    {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(&first) = descriptors.first()
        {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(first) });
        }
    }
    Err("youki sent no terminal".into())
}
