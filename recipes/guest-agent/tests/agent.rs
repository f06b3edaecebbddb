//! What only shows on this side of the wire: the agent's descriptors and bounds, and a clock that is not a guest's.
//!
//! How the agent behaves over the wire is the contract suite's (`tests/contract/test_agent*.py`), on both sides.

mod running;

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use running::{Agent, LIMIT};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tonic::transport::Channel;
use tonic::{Code, Streaming};
use vz_guest_agent::proto::agent_service_client::AgentServiceClient;
use vz_guest_agent::proto::exec_event::Event;
use vz_guest_agent::proto::{ExecEvent, ExecRequest, PingRequest, SignalRequest, StdinWriteRequest, TransportMetadata};

fn client(agent: &Agent) -> AgentServiceClient<Channel> {
    AgentServiceClient::new(agent.channel.clone())
}

async fn shell(agent: &Agent, script: &str, allocate_pty: bool) -> Streaming<ExecEvent> {
    let request = ExecRequest {
        command: "sh".into(),
        args: vec!["-c".into(), script.into()],
        allocate_pty,
        ..ExecRequest::default()
    };
    client(agent).exec(request).await.unwrap().into_inner()
}

async fn next(events: &mut Streaming<ExecEvent>) -> Option<ExecEvent> {
    tokio::time::timeout(LIMIT, events.message()).await.unwrap().unwrap()
}

/// The rest of a stream: all output, and the last event.
async fn rest(mut events: Streaming<ExecEvent>) -> (String, Event) {
    let (mut output, mut end) = (vec![], None);
    while let Some(event) = next(&mut events).await {
        match event.event.unwrap() {
            Event::Stdout(data) | Event::Stderr(data) => output.extend(data),
            last => end = Some(last),
        }
    }
    (String::from_utf8(output).unwrap(), end.unwrap())
}

#[tokio::test]
async fn the_hosts_answer_leaves_a_clock_alone_that_is_not_a_guests() {
    let directory = std::env::temp_dir().join(format!("vz-guest-agent-ready-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let host = directory.join("host.sock");
    let listener = UnixListener::bind(&host).unwrap();
    let agent = Agent::start(&["--ready", &format!("unix:{}", host.display())]).await;
    let (stream, _) = tokio::time::timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    assert_eq!(line, format!("ready {} 1\n", env!("CARGO_PKG_VERSION")));
    stream.write_all(b"time 1000.5\n").await.unwrap();
    // The agent has no more to say, and closes.
    let more = tokio::time::timeout(LIMIT, stream.read_line(&mut line)).await;
    assert_eq!(more.unwrap().unwrap(), 0);
    assert!(std::time::UNIX_EPOCH.elapsed().unwrap() > Duration::from_secs(1_000_000));
    client(&agent).ping(PingRequest {}).await.unwrap();
    std::fs::remove_dir_all(directory).unwrap();
}

#[tokio::test]
async fn a_command_has_the_ordinary_limits_and_leaves_no_descriptor_behind() {
    let agent = Agent::start(&[]).await;
    let limits = |process: &str| {
        let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let values: Vec<u64> = line.split_whitespace().flat_map(str::parse).collect();
        (values[0], values[1])
    };
    let (soft, hard) = limits("self");
    let own = limits(&agent.process.id().to_string());
    assert!(own.0 >= hard.min(65536), "{own:?}");
    let open = || {
        std::fs::read_dir(format!("/proc/{}/fd", agent.process.id()))
            .unwrap()
            .count()
    };
    // With the connection, which an answer shows to be accepted.
    client(&agent).ping(PingRequest {}).await.unwrap();
    let before = open();
    let mut streams = vec![];
    for number in 0..100 {
        streams.push(shell(&agent, "ulimit -Sn; ulimit -Hn", number % 2 == 0).await);
        // One that cannot start, and one whose client does not stay.
        rest(shell(&agent, "exec /no/such/command", false).await).await;
        drop(shell(&agent, "sleep 1000", number % 2 == 0).await);
    }
    for events in streams {
        let (output, end) = rest(events).await;
        assert_eq!(
            output.split_whitespace().collect::<Vec<_>>(),
            [soft.to_string(), hard.to_string()]
        );
        assert_eq!(end, Event::ExitCode(0));
    }
    let start = Instant::now();
    while open() > before {
        assert!(start.elapsed() < LIMIT, "{} descriptors, {before} before", open());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn input_that_nobody_reads_is_bounded() {
    let agent = Agent::start(&[]).await;
    let mut events = shell(&agent, "sleep 1000", false).await;
    let exec_id = next(&mut events).await.unwrap().exec_id;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..30 {
        let mut client = client(&agent);
        calls.spawn(async move {
            let data = vec![0; 3 << 20].into();
            let request = StdinWriteRequest {
                exec_id,
                data,
                metadata: None,
            };
            client.stdin_write(request).await.unwrap_err()
        });
    }
    // 21 of 3 MiB fit into 64 MiB.
    for _ in 0..9 {
        let refused = calls.join_next().await.unwrap().unwrap();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
        assert!(refused.message().contains("64 MiB"), "{refused:?}");
    }
    let signal = SignalRequest {
        exec_id,
        signal: 9,
        metadata: None,
    };
    client(&agent).signal(signal).await.unwrap();
    while let Some(ended) = calls.join_next().await {
        let code = ended.unwrap().code();
        assert!([Code::NotFound, Code::FailedPrecondition].contains(&code), "{code:?}");
    }
    assert_eq!(rest(events).await.1, Event::ExitCode(137));
}

/// A program that cannot be opened yet, as on a share whose host does not answer: who opens it waits until the write lease
/// is given up, fcntl(2).
struct Unopened {
    path: std::path::PathBuf,
    file: std::fs::File,
}

impl Unopened {
    fn new(path: std::path::PathBuf) -> Self {
        std::fs::copy("/bin/true", &path).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        // SAFETY: no memory is passed. The kernel tells of who waits by SIGIO, whose default would end this process.
        let held = unsafe {
            nix::libc::signal(nix::libc::SIGIO, nix::libc::SIG_IGN);
            nix::libc::fcntl(file.as_raw_fd(), nix::libc::F_SETLEASE, nix::libc::F_WRLCK)
        };
        assert_eq!(held, 0, "{}", std::io::Error::last_os_error());
        Self { path, file }
    }

    fn open_up(self) {
        drop(self.file);
    }
}

#[tokio::test]
async fn a_program_that_cannot_be_opened_yet_keeps_nobody_waiting_but_its_caller() {
    let agent = Agent::start(&[]).await;
    let program = Unopened::new(agent.directory.join("program"));
    let request = |idempotency_key: &str| ExecRequest {
        command: program.path.to_str().unwrap().into(),
        metadata: Some(TransportMetadata {
            idempotency_key: idempotency_key.into(),
            ..TransportMetadata::default()
        }),
        ..ExecRequest::default()
    };
    let mut kept = client(&agent).exec(request("kept")).await.unwrap().into_inner();
    drop(client(&agent).exec(request("dropped")).await.unwrap());
    client(&agent).ping(PingRequest::default()).await.unwrap();
    assert_eq!(rest(shell(&agent, "echo others", false).await).await.0, "others\n");
    let silence = tokio::time::timeout(Duration::from_millis(100), kept.message()).await;
    assert!(
        silence.is_err(),
        "the others were answered while it could not be opened"
    );
    program.open_up();
    assert_eq!(rest(kept).await.1, Event::ExitCode(0));
}
