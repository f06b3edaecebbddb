//! Where connections come from: a vsock port that only the host may use, or a Unix socket for tests.

use std::fmt;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use tonic::transport::server::Connected;

use crate::authority::Inbound;
use crate::clock::HostTime;
use crate::idempotency::{Calls, Kept};
use crate::resume::Resume;
use crate::{AGENT_PROTOCOL_REVISION, VERSION};

/// The host's address on every vsock (vsock(7): `VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// Bytes per write call. A larger write becomes a packet of several descriptors in the guest's kernel, which
/// vhost-device-vsock 0.3.0 never takes: the connection would stall for ever.
pub const MAX_WRITE: usize = 16 * 1024;

/// Connections at once; further ones wait in the kernel's queue until one ends. Each costs memory, some 30 KiB.
const MAX_CONNECTIONS: usize = 1024;

/// After a failed accept (no file descriptor left, say) the next try waits this long, so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long the ready line may take. The host either waits for it or is not interested.
const ANNOUNCE_LIMIT: Duration = Duration::from_secs(2);

/// How long the host's answer to it is waited for, beside the service.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Bytes of the answer that are read at most.
const ANSWER_SIZE: u64 = 64;

/// The connections of a [`Listener`]; never an error, since one bad connection is no reason to end the service.
pub type Connections = ReceiverStream<io::Result<Connection>>;

/// A place to listen on or to connect to: `vsock:PORT` (the host's port when connecting) or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A vsock port.
    Vsock(u32),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vsock", port)) => port
                .parse()
                .map(Self::Vsock)
                .map_err(|_| format!("{port:?} is not a vsock port")),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text:?} is neither vsock:PORT nor unix:PATH")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A bound socket: connects are queued by the kernel from now on.
pub enum Listener {
    /// Takes connections of the host, and of nobody else. Before each the guest makes sure that it was not restored.
    Vsock(VsockListener, Arc<Resume>),
    /// Takes connections of whoever may open the socket's file.
    Unix(UnixListener),
}

impl Listener {
    /// Binds `endpoint`; a Unix socket's file left by an earlier process is replaced.
    ///
    /// # Errors
    /// What the kernel says: address in use, no vsock device, no such directory.
    pub fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Vsock(port) => {
                let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, *port))?;
                Ok(Self::Vsock(listener, Resume::new()))
            }
            Endpoint::Unix(path) => {
                if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
                    std::fs::remove_file(path)?;
                }
                UnixListener::bind(path).map(Self::Unix)
            }
        }
    }

    /// What keeps the guest its own when it is restored; `None` where this is no guest.
    #[must_use]
    pub fn resume(&self) -> Option<Arc<Resume>> {
        match self {
            Self::Vsock(_, resume) => Some(Arc::clone(resume)),
            Self::Unix(_) => None,
        }
    }

    /// Accepts connections in the background until the returned stream is dropped.
    #[must_use]
    pub fn connections(self) -> Connections {
        let (sender, receiver) = mpsc::channel(1);
        let kept = Kept::default();
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        tokio::spawn(async move {
            while let Ok(place) = places.clone().acquire_owned().await {
                match self.accept().await {
                    Ok(Some(stream)) => {
                        if sender.send(Ok(Connection::new(stream, &kept, place))).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => {}
                    Err(error) => {
                        eprintln!("vz-guest-agent: accept: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        });
        ReceiverStream::new(receiver)
    }

    /// The next connection; `None` for one that was turned away.
    async fn accept(&self) -> io::Result<Option<Box<dyn Stream>>> {
        match self {
            Self::Vsock(listener, resume) => {
                let (stream, peer) = listener.accept().await?;
                if may_connect(peer.cid()) {
                    resume.freshen().await;
                    return Ok(Some(Box::new(resume.noticing(stream)?)));
                }
                eprintln!(
                    "vz-guest-agent: turned away vsock CID {}, which is not the host",
                    peer.cid()
                );
                Ok(None)
            }
            Self::Unix(listener) => Ok(Some(Box::new(listener.accept().await?.0))),
        }
    }
}

fn may_connect(cid: u32) -> bool {
    cid == HOST_CID
}

/// Connects to `endpoint` once and writes `ready <version> <protocol revision>\n`. The host may answer with a line
/// that tells the time ([`HostTime`]); `None` when it does not.
///
/// # Errors
/// When nobody listens there, or the line was not taken in time. Readiness does not depend on it.
pub async fn announce(endpoint: &Endpoint) -> io::Result<Option<HostTime>> {
    let tell = async {
        let mut stream: Box<dyn Stream> = match endpoint {
            Endpoint::Vsock(port) => Box::new(VsockStream::connect(VsockAddr::new(HOST_CID, *port)).await?),
            Endpoint::Unix(path) => Box::new(UnixStream::connect(path).await?),
        };
        let line = format!("ready {VERSION} {AGENT_PROTOCOL_REVISION}\n");
        stream.write_all(line.as_bytes()).await?;
        io::Result::Ok(stream)
    };
    let stream = tokio::time::timeout(ANNOUNCE_LIMIT, tell).await??;
    let asked = Instant::now();
    let mut line = String::new();
    // The stream stays open for both sides meanwhile: not every device passes half a shutdown on.
    let answer = async { BufReader::new(stream.take(ANSWER_SIZE)).read_line(&mut line).await };
    match tokio::time::timeout(ANSWER_LIMIT, answer).await {
        Ok(Ok(_)) => Ok(HostTime::parse(&line, asked.elapsed())),
        Ok(Err(_)) | Err(_) => Ok(None),
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// One accepted connection. No write is larger than [`MAX_WRITE`], and a client may call the agent what it likes.
pub struct Connection {
    stream: Box<dyn Stream>,
    inbound: Inbound,
    calls: Calls,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn new(stream: Box<dyn Stream>, kept: &Kept, place: OwnedSemaphorePermit) -> Self {
        Self {
            stream,
            inbound: Inbound::default(),
            calls: Calls::new(kept),
            _place: place,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, inbound, .. } = self.get_mut();
        inbound.poll_read(Pin::new(stream), cx, buf)
    }
}

// `poll_write_vectored` stays the trait's own, which writes the first buffer by `poll_write`.
impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, &data[..data.len().min(MAX_WRITE)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = Calls;

    fn connect_info(&self) -> Calls {
        self.calls.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_read_as_they_print() {
        for text in ["vsock:7424", "unix:/run/agent.sock"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        for text in ["vsock:", "vsock:x", "unix:", "7424", "vsock:-1"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_the_host_may_connect() {
        assert!(may_connect(2));
        // VMADDR_CID_LOCAL and another guest.
        assert!(!may_connect(1));
        assert!(!may_connect(3));
    }

    #[tokio::test]
    async fn only_a_socket_is_replaced() {
        let path = std::env::temp_dir().join(format!("vz-guest-agent-bind-{}", std::process::id()));
        let endpoint = Endpoint::Unix(path.clone());
        drop(Listener::bind(&endpoint).unwrap());
        drop(Listener::bind(&endpoint).unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "data").unwrap();
        assert!(Listener::bind(&endpoint).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        std::fs::remove_file(&path).unwrap();
    }

    #[tokio::test]
    async fn no_write_is_larger_than_the_limit() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let place = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let mut connection = Connection::new(Box::new(ours), &Kept::default(), place);
        let data: Vec<u8> = (0..=255u8).cycle().take(100_000).collect();
        assert_eq!(connection.write(&data).await.unwrap(), MAX_WRITE);
        let slices = [io::IoSlice::new(&data), io::IoSlice::new(&data)];
        assert_eq!(connection.write_vectored(&slices).await.unwrap(), MAX_WRITE);
        connection.write_all(&data).await.unwrap();
        drop(connection);
        let mut arrived = Vec::new();
        theirs.read_to_end(&mut arrived).await.unwrap();
        assert_eq!(arrived.len(), 2 * MAX_WRITE + data.len());
        assert!(arrived.ends_with(&data));
    }
}
