//! `PortForward` of the real binary: what a client sends arrives at a socket of this machine, and the other way round.

mod running;

use std::time::Duration;

use prost::bytes::Bytes;
use running::{Agent, LIMIT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use vz_guest_agent::proto::agent_service_client::AgentServiceClient;
use vz_guest_agent::proto::port_forward_frame::Frame;
use vz_guest_agent::proto::{PingRequest, PortForwardFrame, PortForwardOpen};

fn open(port: u32, protocol: &str, host: &str) -> Frame {
    Frame::Open(PortForwardOpen {
        target_port: port,
        protocol: protocol.into(),
        target_host: host.into(),
        metadata: None,
    })
}

/// A client's end of a call.
struct Forward {
    sender: Option<mpsc::Sender<PortForwardFrame>>,
    answers: Streaming<PortForwardFrame>,
}

impl Forward {
    async fn start(agent: &Agent, first: Frame) -> Result<Self, Status> {
        let (sender, frames) = mpsc::channel(1);
        let first = PortForwardFrame { frame: Some(first) };
        sender.send(first).await.unwrap();
        let answers = AgentServiceClient::new(agent.channel.clone())
            .port_forward(ReceiverStream::new(frames))
            .await?
            .into_inner();
        Ok(Self {
            sender: Some(sender),
            answers,
        })
    }

    async fn send(&self, frame: Frame) {
        let frame = PortForwardFrame { frame: Some(frame) };
        self.sender.as_ref().unwrap().send(frame).await.unwrap();
    }

    async fn send_data(&self, bytes: &[u8]) {
        self.send(Frame::Data(Bytes::copy_from_slice(bytes))).await;
    }

    fn close(&mut self) {
        self.sender = None;
    }

    /// The next frame's data; `None` at the end.
    async fn receive(&mut self) -> Result<Option<Bytes>, Status> {
        let frame = timeout(LIMIT, self.answers.message()).await.expect("no frame")?;
        Ok(frame.map(|frame| match frame.frame {
            Some(Frame::Data(bytes)) => bytes,
            other => panic!("no data: {other:?}"),
        }))
    }

    async fn receive_all(&mut self) -> Result<Vec<u8>, Status> {
        let mut all = Vec::new();
        while let Some(bytes) = self.receive().await? {
            assert!(bytes.len() <= 16 * 1024);
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }
}

async fn listener() -> (TcpListener, u32) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    (listener, port)
}

async fn udp() -> (UdpSocket, u32) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(socket.local_addr().unwrap().port());
    (socket, port)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..=250u8).cycle().take(length).collect()
}

#[tokio::test]
async fn the_clients_end_is_a_half_close_and_the_targets_end_ends_the_stream() {
    let agent = Agent::start(&[]).await;
    let (listener, port) = listener().await;
    // Answers only after it has seen the end of what it was sent.
    let target = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all.reverse();
        stream.write_all(&all).await.unwrap();
    });
    let sent = pattern(1_000_003);
    let mut forward = Forward::start(&agent, open(port, "tcp", "")).await.unwrap();
    for chunk in sent.chunks(60_000) {
        forward.send_data(chunk).await;
    }
    forward.close();
    let mut back = forward.receive_all().await.unwrap();
    back.reverse();
    assert!(back == sent, "{} bytes came back", back.len());
    target.await.unwrap();
}

/// A target may have answered and ended before the agent looks at what the client sent long ago. Which of the two the
/// agent sees first is chance, so it is tried often, against a target that is as quick as can be.
#[tokio::test]
async fn what_was_said_before_the_target_ended_arrives() {
    let agent = Agent::start(&[]).await;
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = u32::from(socket.local_addr().unwrap().port());
    let target = std::thread::spawn(move || {
        for round in 0..50 {
            let (mut stream, _) = socket.accept().unwrap();
            std::io::Write::write_all(&mut stream, b"answer").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut said = String::new();
            std::io::Read::read_to_string(&mut stream, &mut said).unwrap();
            assert_eq!(said, "early", "round {round}");
        }
    });
    for _ in 0..50 {
        let frames = [open(port, "tcp", ""), Frame::Data(Bytes::from_static(b"early"))];
        let frames = frames.map(|frame| PortForwardFrame { frame: Some(frame) });
        let answers = AgentServiceClient::new(agent.channel.clone())
            .port_forward(tokio_stream::iter(frames))
            .await;
        let mut answers = answers.unwrap().into_inner();
        while timeout(LIMIT, answers.message())
            .await
            .expect("no frame")
            .unwrap()
            .is_some()
        {}
    }
    target.join().unwrap();
}

#[tokio::test]
async fn both_ways_at_once_and_by_name() {
    let agent = Agent::start(&[]).await;
    let (listener, port) = listener().await;
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
    });
    let mut forward = Forward::start(&agent, open(port, "tcp", "localhost")).await.unwrap();
    for round in 0..50u8 {
        forward.send_data(&[round; 100]).await;
        let mut echo = Vec::new();
        while echo.len() < 100 {
            echo.extend(forward.receive().await.unwrap().unwrap());
        }
        assert_eq!(echo, [round; 100]);
    }
    forward.close();
    assert_eq!(forward.receive().await.unwrap(), None);
}

#[tokio::test]
async fn datagrams_keep_their_bounds_the_empty_one_too() {
    let agent = Agent::start(&[]).await;
    let (socket, port) = udp().await;
    let mut forward = Forward::start(&agent, open(port, "udp", "")).await.unwrap();
    let largest = pattern(65_507);
    let mut buffer = vec![0; 70_000];
    for datagram in [&b"one"[..], b"", b"three", &largest] {
        forward.send_data(datagram).await;
        let (length, from) = timeout(LIMIT, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
        assert!(buffer[..length] == *datagram);
        socket.send_to(&buffer[..length], from).await.unwrap();
        assert!(forward.receive().await.unwrap().unwrap() == *datagram);
    }
    // What comes after the client's end is still passed on.
    forward.send_data(b"last").await;
    forward.close();
    let (length, from) = timeout(LIMIT, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    socket.send_to(&buffer[..length], from).await.unwrap();
    assert_eq!(forward.receive().await.unwrap().unwrap(), &b"last"[..]);
}

#[tokio::test]
async fn a_datagram_that_is_too_large_is_a_status() {
    let agent = Agent::start(&[]).await;
    let (_socket, port) = udp().await;
    let mut forward = Forward::start(&agent, open(port, "udp", "")).await.unwrap();
    forward.send_data(&pattern(65_508)).await;
    let status = forward.receive().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("65508"), "{status}");
}

#[tokio::test]
async fn where_nothing_listens_the_status_names_the_target() {
    let agent = Agent::start(&[]).await;
    let (socket, port) = listener().await;
    drop(socket);
    let status = Forward::start(&agent, open(port, "tcp", "")).await.err().unwrap();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), format!("nothing listens on tcp 127.0.0.1:{port}"));

    let (socket, port) = udp().await;
    drop(socket);
    let mut forward = Forward::start(&agent, open(port, "udp", "")).await.unwrap();
    forward.send_data(b"hello?").await;
    let status = forward.receive().await.unwrap_err();
    assert_eq!(status.message(), format!("nothing listens on udp 127.0.0.1:{port}"));
}

#[tokio::test]
async fn a_listener_that_comes_a_little_later_is_waited_for() {
    let agent = Agent::start(&[]).await;
    let (socket, port) = listener().await;
    let address = socket.local_addr().unwrap();
    drop(socket);
    let waiting = Forward::start(&agent, open(port, "tcp", ""));
    tokio::pin!(waiting);
    // The first try at least has failed by then.
    let early = timeout(Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "{:?}", early.map(Result::err));
    let socket = TcpListener::bind(address).await.unwrap();
    let mut forward = waiting.await.unwrap();
    forward.send_data(b"late").await;
    forward.close();
    let (mut stream, _) = socket.accept().await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "late");
}

#[tokio::test]
async fn nobody_is_waited_for_when_the_client_has_gone() {
    let agent = Agent::start(&[]).await;
    let (socket, port) = listener().await;
    let address = socket.local_addr().unwrap();
    drop(socket);
    let waiting = Forward::start(&agent, open(port, "tcp", ""));
    assert!(timeout(Duration::from_millis(300), waiting).await.is_err());
    // An answer on the same connection: what was sent before has arrived.
    let mut client = AgentServiceClient::new(agent.channel.clone());
    client.ping(PingRequest {}).await.unwrap();
    let socket = TcpListener::bind(address).await.unwrap();
    // Longer than any pause between two tries.
    let late = timeout(Duration::from_secs(1), socket.accept()).await;
    assert!(late.is_err(), "the agent still tries to connect");
}

#[tokio::test]
async fn a_first_frame_that_opens_nothing_is_refused() {
    let agent = Agent::start(&[]).await;
    for (first, named) in [
        (Frame::Data(Bytes::from_static(b"data")), "open frame"),
        (open(0, "tcp", ""), "0"),
        (open(70_000, "tcp", ""), "70000"),
        (open(80, "icmp", ""), "icmp"),
        (open(80, "tcp", "no.such.host.invalid"), "no.such.host.invalid"),
    ] {
        let status = Forward::start(&agent, first).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(named), "{status}");
    }
}

#[tokio::test]
async fn a_second_open_frame_is_refused() {
    let agent = Agent::start(&[]).await;
    let (_listener, port) = listener().await;
    let mut forward = Forward::start(&agent, open(port, "tcp", "")).await.unwrap();
    forward.send(open(port, "tcp", "")).await;
    assert_eq!(forward.receive().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_client_that_vanishes_closes_the_connection() {
    let agent = Agent::start(&[]).await;
    let (listener, port) = listener().await;
    let forward = Forward::start(&agent, open(port, "tcp", "")).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    drop(forward);
    // An end, or a reset: either tells the target.
    let end = timeout(LIMIT, stream.read(&mut [0; 1]))
        .await
        .expect("the connection is still open");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

/// Writes until nothing more is taken for a while; how much was taken.
async fn fill(stream: &mut TcpStream) -> usize {
    let chunk = vec![7; 64 * 1024];
    let mut taken = 0;
    while let Ok(written) = timeout(Duration::from_secs(1), stream.write(&chunk)).await {
        taken += written.unwrap();
        assert!(taken < 256 << 20, "the agent takes all there is");
    }
    taken
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_target_and_nobody_else() {
    let agent = Agent::start(&[]).await;
    let (listener, port) = listener().await;
    let mut slow = Forward::start(&agent, open(port, "tcp", "")).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let taken = fill(&mut stream).await;
    let mut client = AgentServiceClient::new(agent.channel.clone());
    timeout(LIMIT, client.ping(PingRequest {})).await.unwrap().unwrap();
    drop(stream);
    assert_eq!(slow.receive_all().await.unwrap().len(), taken);
}

#[tokio::test]
async fn targets_that_do_not_read_stop_their_clients_and_nobody_else() {
    let agent = Agent::start(&[]).await;
    let (listener, port) = listener().await;
    let chunk = Bytes::from(vec![7; 64 * 1024]);
    let mut stalled = Vec::new();
    for _ in 0..4 {
        let forward = Forward::start(&agent, open(port, "tcp", "")).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut sent = 0;
        while timeout(Duration::from_millis(500), forward.send(Frame::Data(chunk.clone())))
            .await
            .is_ok()
        {
            sent += chunk.len();
            assert!(sent < 256 << 20, "the agent takes all there is");
        }
        stalled.push((forward, stream, sent));
    }
    // On the same connection: its window is not used up by those that wait.
    let sink = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all.len()
    });
    let mut brisk = Forward::start(&agent, open(port, "tcp", "")).await.unwrap();
    for _ in 0..64 {
        timeout(LIMIT, brisk.send_data(&chunk))
            .await
            .expect("the stalled ones stall all");
    }
    brisk.close();
    assert_eq!(timeout(LIMIT, sink).await.unwrap().unwrap(), 64 * chunk.len());

    let mut buffer = vec![0; 1 << 20];
    for (_forward, mut stream, sent) in stalled {
        let mut arrived = 0;
        while arrived < sent {
            arrived += timeout(LIMIT, stream.read(&mut buffer)).await.unwrap().unwrap();
        }
    }
}
