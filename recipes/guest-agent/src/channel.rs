//! The agent's end of a command's pipe or terminal: read and written without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use prost::bytes::Bytes;
use tokio::io::unix::AsyncFd;

/// Most bytes that one read takes, and so one event carries.
pub const CHUNK: usize = 16 * 1024;

/// More than a terminal holds: 8 KiB on the way and 4 KiB to be read.
const TERMINAL_HOLDS: usize = 64 * 1024;

/// One end. Reading and writing may go on at the same time, as a terminal needs it.
pub struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes the descriptor over and makes it non-blocking.
    ///
    /// # Errors
    /// What the kernel says; it refuses what cannot be waited for, such as a file.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
        fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the descriptor is owned, and stays the same until it is dropped with the `AsyncFd`.
        Ok(Self(unsafe { AsyncFd::register(descriptor) }?))
    }

    /// The next chunk, `None` at the end.
    pub async fn read(&self) -> Option<Bytes> {
        loop {
            let mut ready = self.0.readable().await.ok()?;
            if let Ok(chunk) = ready.try_io(|descriptor| read(descriptor.as_fd(), CHUNK)) {
                // An error is the end as well: a terminal without a program raises one, a pipe has none of its own.
                return chunk.ok().filter(|chunk| !chunk.is_empty());
            }
        }
    }

    /// What an ended command left behind, at most what a pipe or terminal holds. A background process may keep the
    /// other end open and go on writing: neither its end nor its output is waited for.
    pub fn left_over(&self) -> impl Iterator<Item = Bytes> {
        let capacity = fcntl(self, FcntlArg::F_GETPIPE_SZ).map(usize::try_from);
        let mut left = capacity.unwrap_or(Ok(TERMINAL_HOLDS)).unwrap_or(0);
        std::iter::from_fn(move || {
            // No data is an error like any other.
            let chunk = read(self.as_fd(), CHUNK.min(left)).ok()?;
            left -= chunk.len();
            (!chunk.is_empty()).then_some(chunk)
        })
    }

    /// Writes all of `data`, as fast as the other end is read.
    ///
    /// # Errors
    /// What the kernel says; `BrokenPipe` when nobody reads any more. Some of `data` may have been written.
    pub async fn write(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.0.writable().await?;
            if let Ok(written) = ready.try_io(|descriptor| Ok(nix::unistd::write(descriptor, data)?)) {
                data = &data[written?..];
            }
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// A chunk of at most `limit` bytes; the buffer lives only during the call, so that idle commands hold none.
fn read(descriptor: BorrowedFd<'_>, limit: usize) -> io::Result<Bytes> {
    let mut buffer = [0; CHUNK];
    let length = nix::unistd::read(descriptor, &mut buffer[..limit])?;
    Ok(Bytes::copy_from_slice(&buffer[..length]))
}

#[cfg(test)]
mod tests {
    use nix::unistd::pipe;

    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read_and_then_comes_the_end() {
        let (reader, writer) = pipe().unwrap();
        let (reader, writer) = (Channel::new(reader).unwrap(), Channel::new(writer).unwrap());
        let data: Vec<u8> = (0..=255u8).cycle().take(1 << 20).collect();
        let sent = data.clone();
        let writing = tokio::spawn(async move { writer.write(&sent).await });
        let mut arrived = Vec::new();
        while let Some(chunk) = reader.read().await {
            assert!(chunk.len() <= CHUNK);
            arrived.extend(chunk);
        }
        writing.await.unwrap().unwrap();
        assert!(arrived == data);
    }

    #[tokio::test]
    async fn a_pipe_without_a_reader_is_broken() {
        let (reader, writer) = pipe().unwrap();
        let writer = Channel::new(writer).unwrap();
        let writing = tokio::spawn(async move { writer.write(&vec![0; 1 << 20]).await });
        tokio::task::yield_now().await;
        drop(reader);
        assert_eq!(writing.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn what_is_left_over_is_bounded_and_not_waited_for() {
        let (reader, writer) = pipe().unwrap();
        let (reader, writer) = (Channel::new(reader).unwrap(), Channel::new(writer).unwrap());
        assert_eq!(reader.left_over().count(), 0);
        writer.write(&vec![7; 40_000]).await.unwrap();
        assert_eq!(reader.left_over().map(|chunk| chunk.len()).sum::<usize>(), 40_000);
    }
}
