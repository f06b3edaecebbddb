//! One `PortForward` call: a stream of frames on one side, a TCP connection or a UDP socket in the guest on the other.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use prost::bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, UdpSocket, lookup_host};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::{Status, Streaming};

use crate::proto::port_forward_frame::Frame;
use crate::proto::{PortForwardFrame, PortForwardOpen};

/// Bytes of a TCP connection in one frame.
const CHUNK: usize = 16 * 1024;

/// The largest datagram; one is never split over frames.
const DATAGRAM: usize = 64 * 1024;

/// Frames that wait for a slow client. A full queue leaves the data in the socket, and then the target waits.
const QUEUE: usize = 8;

/// How long a target may take to answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How long a listener on the target's port is waited for: a service that was started just now may not be there yet.
const LISTEN_LIMIT: Duration = Duration::from_secs(5);

/// The pauses between two tries to connect: the first one, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// How long what the client has sent is waited for when the target has ended: as long as our own buffers take.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// Datagrams have no end: after the client's, answers are passed on until none came for this long.
const UDP_LINGER: Duration = Duration::from_secs(5);

/// What goes to the client; dropping it closes the socket.
pub type Frames = mpsc::Receiver<Result<PortForwardFrame, Status>>;

/// Connects to the target that the first frame names, and returns what comes from there.
///
/// # Errors
/// `INVALID_ARGUMENT` when the first frame is none that opens or names no port, protocol or known host; `UNAVAILABLE`
/// when nobody listens on the target's port within [`LISTEN_LIMIT`], or the target does not answer; the client's own status when it is gone before it said anything.
pub async fn open(mut client: Streaming<PortForwardFrame>) -> Result<Frames, Status> {
    let first = client.message().await?.and_then(|frame| frame.frame);
    let Some(Frame::Open(open)) = first else {
        return Err(Status::invalid_argument(
            "PortForward: the first frame must be an open frame, which names the target",
        ));
    };
    let target = Target::of(open)?;
    let addresses = target.resolve().await?;
    let (queue, frames) = mpsc::channel(QUEUE);
    let gone = queue.clone();
    match target.protocol {
        Protocol::Tcp => {
            let stream = target.reach(&addresses, TcpStream::connect).await?;
            // Frames are written as they come, and a small one must not wait for the next.
            let _ = stream.set_nodelay(true);
            let (from_target, to_target) = stream.into_split();
            let relay = relay_tcp(target, client, to_target, from_target, queue);
            tokio::spawn(until_gone(relay, gone));
        }
        Protocol::Udp => {
            let socket = target.reach(&addresses, connect_udp).await?;
            tokio::spawn(until_gone(relay_udp(target, client, socket, queue), gone));
        }
    }
    Ok(frames)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

#[derive(Debug)]
struct Target {
    protocol: Protocol,
    host: String,
    port: u16,
}

impl Target {
    fn of(open: PortForwardOpen) -> Result<Self, Status> {
        let protocol = match open.protocol.as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            other => {
                return Err(Status::invalid_argument(format!(
                    "PortForward: the protocol is \"tcp\" or \"udp\", not {other:?}"
                )));
            }
        };
        let port = u16::try_from(open.target_port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| {
            Status::invalid_argument(format!("PortForward: {} is no port (1 to 65535)", open.target_port))
        })?;
        let host = if open.target_host.is_empty() {
            Ipv4Addr::LOCALHOST.to_string()
        } else {
            open.target_host
        };
        Ok(Self { protocol, host, port })
    }

    async fn resolve(&self) -> Result<Vec<SocketAddr>, Status> {
        let unknown = |why: &dyn fmt::Display| {
            Status::invalid_argument(format!("the guest finds no host {:?}: {why}", self.host))
        };
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let found: Vec<SocketAddr> = lookup_host((host, self.port))
            .await
            .map_err(|error| unknown(&error))?
            .collect();
        if found.is_empty() {
            return Err(unknown(&"its name has no address"));
        }
        Ok(found)
    }

    /// The first of `addresses` that can be connected to; while nobody listens there, tries again.
    async fn reach<T, F>(&self, addresses: &[SocketAddr], connect: impl Fn(SocketAddr) -> F) -> Result<T, Status>
    where
        F: Future<Output = io::Result<T>>,
    {
        let (end, mut pause) = (Instant::now() + LISTEN_LIMIT, PAUSES.0);
        loop {
            let error = match timeout(CONNECT_LIMIT, first(addresses, &connect)).await {
                Ok(Ok(reached)) => return Ok(reached),
                Ok(Err(error)) => error,
                Err(_) => {
                    return Err(Status::unavailable(format!(
                        "{self} did not answer within {} s",
                        CONNECT_LIMIT.as_secs()
                    )));
                }
            };
            if error.kind() != io::ErrorKind::ConnectionRefused || Instant::now() >= end {
                return Err(self.failed(&error));
            }
            sleep_until(end.min(Instant::now() + pause)).await;
            pause = PAUSES.1.min(pause * 3 / 2);
        }
    }

    fn failed(&self, error: &io::Error) -> Status {
        Status::unavailable(match error.kind() {
            io::ErrorKind::ConnectionRefused => format!("nothing listens on {self}"),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => format!("{self} broke the connection"),
            _ => format!("{self} cannot be reached: {error}"),
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{protocol} {}:{}", self.host, self.port)
    }
}

/// What is reached at the first of `addresses` where `connect` does, else why not at the last.
async fn first<T, F>(addresses: &[SocketAddr], connect: impl Fn(SocketAddr) -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match connect(*address).await {
            Ok(reached) => return Ok(reached),
            Err(error) => last = error,
        }
    }
    Err(last)
}

type Queue = mpsc::Sender<Result<PortForwardFrame, Status>>;

fn data(bytes: &[u8]) -> PortForwardFrame {
    PortForwardFrame {
        frame: Some(Frame::Data(Bytes::copy_from_slice(bytes))),
    }
}

/// The next data of the client; `None` at its end.
async fn next(client: &mut Streaming<PortForwardFrame>) -> Result<Option<Bytes>, Status> {
    match client.message().await? {
        None => Ok(None),
        Some(PortForwardFrame {
            frame: Some(Frame::Data(bytes)),
        }) => Ok(Some(bytes)),
        Some(_) => Err(Status::invalid_argument(
            "PortForward: frames after the first hold data",
        )),
    }
}

/// Drops `relay`, and the socket with it, when nobody takes its frames any more.
async fn until_gone(relay: impl Future<Output = ()>, queue: Queue) {
    tokio::select! {
        () = relay => {}
        () = queue.closed() => {}
    }
}

async fn relay_tcp(
    target: Target,
    mut client: Streaming<PortForwardFrame>,
    mut to_target: OwnedWriteHalf,
    mut from_target: OwnedReadHalf,
    queue: Queue,
) {
    let inwards = async {
        while let Some(bytes) = next(&mut client).await? {
            if to_target.write_all(&bytes).await.is_err() {
                // The target takes no more. What it has said is still passed on, and its end says why.
                std::future::pending::<()>().await;
            }
        }
        let _ = to_target.shutdown().await;
        Ok::<(), Status>(())
    };
    let outwards = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            match from_target.read(&mut buffer).await {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    if queue.send(Ok(data(&buffer[..length]))).await.is_err() {
                        return Ok(());
                    }
                }
                Err(error) => return Err(target.failed(&error)),
            }
        }
    };
    tokio::pin!(inwards, outwards);
    let mut client_ended = false;
    let end = loop {
        tokio::select! {
            end = &mut outwards => break end,
            end = &mut inwards, if !client_ended => match end {
                Ok(()) => client_ended = true,
                Err(status) => break Err(status),
            },
        }
    };
    if end.is_ok() && !client_ended {
        // The call ends with what the target says. What the client sent before it may still lie in a buffer, and is the
        // target's; a client that has not ended itself learns of the end this much later.
        let _ = timeout(LAST_WORDS, &mut inwards).await;
    }
    if let Err(status) = end {
        let _ = queue.send(Err(status)).await;
    }
}

async fn connect_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    Ok(socket)
}

async fn relay_udp(target: Target, mut client: Streaming<PortForwardFrame>, socket: UdpSocket, queue: Queue) {
    let mut buffer = vec![0; DATAGRAM];
    let mut client_ended = false;
    let end = loop {
        tokio::select! {
            from_client = next(&mut client), if !client_ended => match from_client {
                Ok(Some(bytes)) => match socket.send(&bytes).await {
                    Ok(_) => {}
                    Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {
                        break Err(Status::invalid_argument(format!(
                            "PortForward: {} bytes are too many for one datagram", bytes.len()
                        )));
                    }
                    Err(error) => break Err(target.failed(&error)),
                },
                Ok(None) => client_ended = true,
                Err(status) => break Err(status),
            },
            from_target = socket.recv(&mut buffer) => match from_target {
                Ok(length) => if queue.send(Ok(data(&buffer[..length]))).await.is_err() {
                    break Ok(());
                },
                Err(error) => break Err(target.failed(&error)),
            },
            () = sleep(UDP_LINGER), if client_ended => break Ok(()),
        }
    };
    if let Err(status) = end {
        let _ = queue.send(Err(status)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(port: u32, protocol: &str, host: &str) -> Result<Target, Status> {
        Target::of(PortForwardOpen {
            target_port: port,
            protocol: protocol.into(),
            target_host: host.into(),
            metadata: None,
        })
    }

    #[test]
    fn a_target_is_a_protocol_a_host_and_a_port() {
        assert_eq!(target(80, "tcp", "").unwrap().to_string(), "tcp 127.0.0.1:80");
        assert_eq!(target(65535, "udp", "box").unwrap().to_string(), "udp box:65535");
    }

    #[test]
    fn what_is_no_target_is_named() {
        for (port, protocol, named) in [
            (0, "tcp", "0"),
            (65536, "tcp", "65536"),
            (80, "sctp", "\"sctp\""),
            (80, "", "\"\""),
        ] {
            let status = target(port, protocol, "").unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(named), "{status}");
        }
    }
}
