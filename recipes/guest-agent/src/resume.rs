//! What a guest that was saved and restored has to find out by itself: that time went on without it, and that another
//! guest, restored from the same state, is about to draw the same random numbers.
//!
//! Nothing tells it so on every machine, so it is assumed or looked for where it is cheap: before each connection of
//! the host is served, when the vsock resets a connection (its first word after a restore), and once a minute.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream as AnySocket; // can tell the error of any
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use nix::libc;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::{Notify, Semaphore};

use crate::clock::{self, Pace};

/// Bytes read of the machine's random number generator. Linux 6.12 keeps up to 128 that it asked for earlier (64 in its
/// core, 64 in the virtio driver), which two restores of one state share: only what follows is new.
const RANDOM_SIZE: usize = 256;

/// How long a connection waits for all of this: milliseconds, but the guest may be emulated on a busy machine. A device
/// that does not answer is not waited for again.
const LIMIT: Duration = Duration::from_secs(5);

/// How often an idle guest looks.
const PERIOD: Duration = Duration::from_secs(60);

/// The clocks are compared to the tick this long after the start, when the guest has come up.
const FIRST: Duration = Duration::from_secs(2);

/// `_IO('R', 0x07)` of linux/random.h: draw a new key from the pool, now.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Keeps a guest's randomness and clock its own across restores. Only for a guest: the clock is the machine's.
pub struct Resume {
    pace: Mutex<Option<Pace>>,
    /// One at a time does the work.
    turn: Arc<Semaphore>,
    /// Whether the last work was not waited for to its end. While it still runs nobody waits again.
    late: AtomicBool,
    noticed: Notify,
}

impl Resume {
    /// Starts with what the clocks say now.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            pace: Mutex::new(Pace::roughly().ok()),
            turn: Arc::new(Semaphore::new(1)),
            late: AtomicBool::new(false),
            noticed: Notify::new(),
        })
    }

    /// New randomness for the kernel, and the clock moved when time has passed without it. Ends within [`LIMIT`].
    pub async fn freshen(self: &Arc<Self>) {
        let work = async {
            let Ok(turn) = self.turn.clone().acquire_owned().await else {
                return;
            };
            let this = Arc::clone(self);
            let work = move || {
                this.refresh();
                drop(turn);
            };
            let _ = tokio::task::spawn_blocking(work).await;
        };
        if self.late.load(Ordering::Relaxed) && self.turn.available_permits() == 0 {
            return;
        }
        let late = tokio::time::timeout(LIMIT, work).await.is_err();
        self.late.store(late, Ordering::Relaxed);
        if late {
            eprintln!("vz-guest-agent: the machine's random number generator gives nothing");
        }
    }

    /// Looks now and then for a restore that no new connection tells of; for ever.
    pub async fn watch(self: Arc<Self>) {
        let mut wait = FIRST;
        loop {
            let _ = tokio::time::timeout(wait, self.noticed.notified()).await;
            self.freshen().await;
            let this = Arc::clone(&self);
            let _ = tokio::task::spawn_blocking(move || this.measure()).await;
            wait = PERIOD;
        }
    }

    /// `stream`, whose reset is noticed.
    ///
    /// # Errors
    /// When no file descriptor is left for it.
    pub fn noticing<S: AsFd>(self: &Arc<Self>, stream: S) -> io::Result<Noticing<S>> {
        let socket = stream.as_fd().try_clone_to_owned()?;
        // Sound: it is the same open descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(AnySocket::from(socket), Interest::ERROR) }?;
        Ok(Noticing {
            stream,
            reset: Box::pin(reset(socket)),
            resume: Arc::clone(self),
        })
    }

    fn refresh(&self) {
        if let Err(error) = reseed() {
            // A machine without such a device has nothing to give, and hears of it once, from the kernel.
            if error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ENODEV) {
                eprintln!("vz-guest-agent: no new randomness: {error}");
            }
        }
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pace) = pace.as_mut() else { return };
        match pace.catch_up() {
            Ok(None) | Err(_) => {}
            Ok(Some(moved)) => {
                eprintln!("vz-guest-agent: the clock stood still and is moved by {moved} s");
                self.noticed.notify_one();
            }
        }
    }

    /// Compares the clocks to the tick, unless that was done since the last jump. Nobody waits for it.
    fn measure(&self) {
        let pace = || self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        if pace().is_none_or(|pace| pace.is_sharp()) {
            return;
        }
        let learnt = clock::tick().and_then(|tick| pace().as_mut().map_or(Ok(()), |pace| pace.learn(tick)));
        if let Err(error) = learnt {
            eprintln!("vz-guest-agent: the real-time clock cannot be followed: {error}");
        }
    }
}

/// Mixes fresh bytes of the machine's generator into the kernel's pool, and has it draw a new key from that.
fn reseed() -> io::Result<()> {
    let mut fresh = [0; RANDOM_SIZE];
    File::open("/dev/hwrng")?.read_exact(&mut fresh)?;
    let mut pool = OpenOptions::new().write(true).open("/dev/urandom")?;
    pool.write_all(&fresh)?;
    // Sound: the request takes no argument.
    if unsafe { libc::ioctl(pool.as_raw_fd(), RNDRESEEDCRNG as libc::Ioctl) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A stream whose reset may mean that the guest was restored. The vsock resets a connection of a restored guest with
/// nothing but EPOLLERR, for which no reader wakes: it would wait for ever.
pub struct Noticing<S> {
    stream: S,
    reset: Pin<Box<dyn Future<Output = io::Result<()>> + Send>>,
    resume: Arc<Resume>,
}

/// Ends when the socket has an error.
async fn reset(socket: AsyncFd<AnySocket>) -> io::Result<()> {
    loop {
        let mut ready = socket.ready(Interest::ERROR).await?;
        if socket.get_ref().take_error()?.is_some() {
            return Ok(());
        }
        ready.clear_ready();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Noticing<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = if self.reset.as_mut().poll(cx).is_ready() {
            self.reset = Box::pin(std::future::pending());
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        } else {
            Pin::new(&mut self.stream).poll_read(cx, buf)
        };
        if let Poll::Ready(Err(error)) = &read
            && error.kind() == io::ErrorKind::ConnectionReset
        {
            self.resume.noticed.notify_one();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noticing<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpStream};

    #[tokio::test]
    async fn a_reset_is_noticed_and_ends_the_stream() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let resume = Resume::new();
        let mut stream = resume.noticing(listener.accept().await.unwrap().0).unwrap();
        client.set_zero_linger().unwrap();
        drop(client);
        let error = stream.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        tokio::time::timeout(LIMIT, resume.noticed.notified()).await.unwrap();
    }

    #[tokio::test]
    async fn other_ends_are_no_resets() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let resume = Resume::new();
        let mut stream = resume.noticing(listener.accept().await.unwrap().0).unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut client, b"ab").await.unwrap();
        drop(client);
        let mut read = Vec::new();
        assert_eq!(stream.read_to_end(&mut read).await.unwrap(), 2);
        let none = tokio::time::timeout(Duration::from_millis(50), resume.noticed.notified()).await;
        assert!(none.is_err());
    }
}
