//! Drives the real binary over a Unix socket, as a host would over vsock.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use prost::bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use vz_guest_agent::proto::agent_service_client::AgentServiceClient;
use vz_guest_agent::proto::exec_event::Event;
use vz_guest_agent::proto::{
    ExecEvent, ExecRequest, PingRequest, ResizeExecPtyRequest, ResourceStatsRequest, SignalRequest, StdinCloseRequest,
    StdinWriteRequest, SystemInfoRequest, TransportMetadata,
};

const BINARY: &str = env!("CARGO_BIN_EXE_vz-guest-agent");

/// Long enough for any machine: only a broken agent meets it.
const LIMIT: Duration = Duration::from_secs(60);

/// A running agent in a directory of its own; both end with it.
struct Agent {
    process: Child,
    directory: PathBuf,
    channel: Channel,
}

impl Agent {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    async fn start_with(arguments: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("vz-guest-agent-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let socket = directory.join("agent.sock");
        // As the guest's init starts it: a shell makes what runs in its background ignore these two.
        let process = Command::new("sh")
            .args(["-c", r#"trap "" INT QUIT; exec "$0" "$@""#, BINARY, "--listen"])
            .arg(format!("unix:{}", socket.display()))
            .args(arguments)
            .env("AGENTS_OWN", "1")
            .spawn()
            .unwrap();
        let channel = connect(&socket).await;
        Self {
            process,
            directory,
            channel,
        }
    }

    fn client(&self) -> AgentServiceClient<Channel> {
        AgentServiceClient::new(self.channel.clone())
    }

    async fn exec(&self, request: ExecRequest) -> Result<Streaming<ExecEvent>, Status> {
        Ok(self.client().exec(request).await?.into_inner())
    }

    /// Runs a shell script to its end.
    async fn shell(&self, script: &str) -> Transcript {
        Transcript::of(self.exec(shell(script)).await.unwrap()).await
    }

    /// Kilobytes on a line of the agent's `/proc/<pid>/status`.
    fn memory(&self, line: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let value = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
        value
            .trim_start_matches(':')
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

async fn connect(socket: &Path) -> Channel {
    let start = Instant::now();
    loop {
        let socket = socket.to_owned();
        let attempt = Endpoint::from_static("http://agent")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
            }))
            .await;
        match attempt {
            Ok(channel) => return channel,
            Err(error) => assert!(start.elapsed() < LIMIT, "the agent never listened: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn request(command: &str, args: &[&str]) -> ExecRequest {
    ExecRequest {
        command: command.into(),
        args: args.iter().map(ToString::to_string).collect(),
        metadata: Some(TransportMetadata {
            request_id: "request-7".into(),
            idempotency_key: String::new(),
        }),
        ..ExecRequest::default()
    }
}

fn shell(script: &str) -> ExecRequest {
    request("sh", &["-c", script])
}

/// A whole stream, read to its end, with the rules that hold for every stream asserted.
#[derive(Debug)]
struct Transcript {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Event,
    exec_id: u64,
}

impl Transcript {
    async fn of(mut events: Streaming<ExecEvent>) -> Self {
        let (mut stdout, mut stderr, mut end, mut exec_id, mut sequence) = (vec![], vec![], None, 0, 0);
        while let Some(event) = tokio::time::timeout(LIMIT, events.message()).await.unwrap().unwrap() {
            assert!(end.is_none(), "{event:?} follows the last event");
            sequence += 1;
            assert_eq!(event.sequence, sequence);
            assert_eq!(event.request_id, "request-7");
            if sequence == 1 {
                exec_id = event.exec_id;
                assert_ne!(exec_id, 0, "the first event carries the exec_id");
            }
            match event.event.expect("no event is empty") {
                Event::Stdout(data) => stdout.extend(data),
                Event::Stderr(data) => stderr.extend(data),
                last => end = Some(last),
            }
        }
        Self {
            stdout,
            stderr,
            end: end.expect("a stream ends with exit_code or error"),
            exec_id,
        }
    }

    fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    fn error(&self) -> &str {
        match &self.end {
            Event::Error(text) => text,
            other => panic!("{other:?} is no error"),
        }
    }
}

/// Waits until `done` holds.
async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what} never came true");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn alive(pid: &str) -> bool {
    // A zombie is still in /proc: reaping is part of the promise, so it counts as alive.
    Path::new("/proc").join(pid).exists()
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .unwrap()
        .contains("\nUid:\t0\t0")
}

fn run(arguments: &[&str]) -> Output {
    Command::new(BINARY)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn version_names_the_crate_and_the_revision() {
    let output = run(&["--version"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        text,
        format!("vz-guest-agent {} (protocol revision 1)\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn a_wrong_option_is_explained() {
    let output = run(&["--port", "1"]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("--port") && text.contains("usage:"), "{text}");
}

#[test]
fn it_refuses_to_be_pid_1() {
    // A PID name space of one's own needs root, or a kernel that lets users make them.
    let output = Command::new("unshare")
        .args([
            "--pid",
            "--fork",
            "--map-root-user",
            BINARY,
            "--listen",
            "unix:/nonexistent/agent.sock",
        ])
        .output();
    let Ok(output) = output else { return };
    let text = String::from_utf8(output.stderr).unwrap();
    if text.contains("unshare:") {
        return;
    }
    assert_eq!(output.status.code(), Some(2));
    assert!(text.contains("PID 1"), "{text}");
}

#[tokio::test]
async fn ping_answers() {
    let agent = Agent::start().await;
    agent.client().ping(PingRequest {}).await.unwrap();
}

#[tokio::test]
async fn system_info_is_the_machines() {
    let agent = Agent::start().await;
    let info = agent
        .client()
        .system_info(SystemInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.agent_protocol_revision, 1);
    assert_eq!(
        info.cpu_count as usize,
        std::thread::available_parallelism().unwrap().get()
    );
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(info.os_version, format!("Linux {}", release.trim()));
    assert!(info.memory_bytes > 16 << 20);
    assert!(info.disk_free_bytes > 0);
}

#[tokio::test]
async fn the_ready_line_comes_once_it_listens() {
    let directory = std::env::temp_dir().join(format!("vz-guest-agent-ready-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let host = directory.join("host.sock");
    let listener = UnixListener::bind(&host).unwrap();
    let agent = Agent::start_with(&["--ready", &format!("unix:{}", host.display())]).await;
    let (stream, _) = tokio::time::timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    assert_eq!(line, format!("ready {} 1\n", env!("CARGO_PKG_VERSION")));
    // The host may answer; the agent then has no more to say. This clock is not a guest's, so it stays as it is.
    stream.write_all(b"time 1000.5\n").await.unwrap();
    assert_eq!(
        tokio::time::timeout(LIMIT, stream.read_line(&mut line))
            .await
            .unwrap()
            .unwrap(),
        0
    );
    assert!(std::time::UNIX_EPOCH.elapsed().unwrap() > Duration::from_secs(1_000_000));
    agent.client().ping(PingRequest {}).await.unwrap();
    drop(agent);
    std::fs::remove_dir_all(directory).unwrap();
}

#[tokio::test]
async fn nobody_needs_to_hear_the_ready_line() {
    let agent = Agent::start_with(&["--ready", "unix:/nonexistent/host.sock"]).await;
    agent.client().ping(PingRequest {}).await.unwrap();
}

#[tokio::test]
async fn both_streams_and_the_exit_code_arrive() {
    let agent = Agent::start().await;
    let first = agent.shell("echo out; echo err >&2; exit 3").await;
    assert_eq!((first.out(), first.stderr.as_slice()), ("out\n", b"err\n".as_slice()));
    assert_eq!(first.end, Event::ExitCode(3));
    let second = agent.shell(":").await;
    assert_eq!(second.end, Event::ExitCode(0));
    assert_ne!(first.exec_id, second.exec_id);
}

#[tokio::test]
async fn output_comes_while_the_command_runs() {
    let agent = Agent::start().await;
    let gate = agent.directory.join("gate");
    let script = format!(
        "echo before; until [ -e {0} ]; do sleep 0.01; done; echo after",
        gate.display()
    );
    let mut events = agent.exec(shell(&script)).await.unwrap();
    let mut seen = Vec::new();
    while seen != b"before\n" {
        let event = tokio::time::timeout(LIMIT, events.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let Some(Event::Stdout(data)) = event.event else {
            panic!("{event:?}")
        };
        seen.extend(data);
    }
    std::fs::write(gate, "").unwrap();
    let mut last = None;
    while let Some(event) = events.message().await.unwrap() {
        last = event.event;
    }
    assert_eq!(last, Some(Event::ExitCode(0)));
}

#[tokio::test]
async fn a_quiet_commands_exec_id_is_known_at_once() {
    let agent = Agent::start().await;
    let mut events = agent.exec(request("sleep", &["1000"])).await.unwrap();
    let event = tokio::time::timeout(LIMIT, events.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!((event.sequence, event.event), (1, Some(Event::Stdout(Bytes::new()))));
    assert_ne!(event.exec_id, 0);
}

#[tokio::test]
async fn death_by_signal_is_128_and_its_number() {
    let agent = Agent::start().await;
    assert_eq!(agent.shell("kill -TERM $$").await.end, Event::ExitCode(143));
    assert_eq!(agent.shell("kill -KILL $$").await.end, Event::ExitCode(137));
}

#[tokio::test]
async fn a_command_ignores_no_signal() {
    let agent = Agent::start().await;
    assert_eq!(agent.shell("kill -INT $$").await.end, Event::ExitCode(130));
    assert_eq!(agent.shell("kill -QUIT $$").await.end, Event::ExitCode(131));
}

#[tokio::test]
async fn what_cannot_start_is_an_error_event() {
    let agent = Agent::start().await;
    for (request, named) in [
        (request("/no/such/command", &[]), "/no/such/command"),
        (request("no-such-command", &[]), "no-such-command"),
        (request("/etc/passwd", &[]), "/etc/passwd"),
        (
            ExecRequest {
                working_dir: "/no/such/place".into(),
                ..shell("pwd")
            },
            "/no/such/place",
        ),
        (
            ExecRequest {
                user: "no-such-user".into(),
                ..shell("id")
            },
            "no-such-user",
        ),
        (request("echo", &["nul\0byte"]), "echo"),
    ] {
        let transcript = Transcript::of(agent.exec(request).await.unwrap()).await;
        assert!(transcript.error().contains(named), "{transcript:?}");
    }
}

#[tokio::test]
async fn a_meaningless_request_is_a_status() {
    let agent = Agent::start().await;
    assert_eq!(
        agent.exec(request("", &[])).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let terminal = ExecRequest {
        allocate_pty: true,
        term_rows: 1 << 20,
        ..shell(":")
    };
    assert_eq!(agent.exec(terminal).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn environment_and_directory_are_the_requests() {
    let agent = Agent::start().await;
    let request = ExecRequest {
        env: BTreeMap::from([("GREETING".into(), "hello".into())]),
        working_dir: "/usr".into(),
        ..shell("pwd; echo $GREETING; echo ${AGENTS_OWN-unset}; echo $PATH; echo ${TERM-unset}")
    };
    let transcript = Transcript::of(agent.exec(request).await.unwrap()).await;
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(transcript.out(), format!("/usr\nhello\nunset\n{path}\nunset\n"));
}

#[tokio::test]
async fn the_commands_path_is_the_requests() {
    let agent = Agent::start().await;
    let tool = agent.directory.join("own-tool");
    std::fs::write(&tool, "#!/bin/sh\necho found\n").unwrap();
    std::fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = agent.directory.display().to_string();
    let request = ExecRequest {
        env: BTreeMap::from([("PATH".into(), path)]),
        ..request("own-tool", &[])
    };
    assert_eq!(
        Transcript::of(agent.exec(request).await.unwrap()).await.out(),
        "found\n"
    );
}

#[tokio::test]
async fn a_user_brings_their_numbers() {
    if !is_root() {
        return;
    }
    let agent = Agent::start().await;
    for (user, wanted) in [
        ("", "0 0 0"),
        ("4711", "4711 4711 4711"),
        ("4711:12", "4711 12 12"),
        ("root", "0 0 0"),
    ] {
        let request = ExecRequest {
            user: user.into(),
            ..shell("echo $(id -u) $(id -g) $(id -G)")
        };
        let transcript = Transcript::of(agent.exec(request).await.unwrap()).await;
        let shown = transcript
            .out()
            .split_whitespace()
            .take(3)
            .collect::<Vec<_>>()
            .join(" ");
        assert_eq!(shown, wanted, "user {user:?}");
    }
}

#[tokio::test]
async fn much_output_arrives_whole_and_waits_for_a_slow_reader() {
    const SIZE: usize = 64 << 20;
    let agent = Agent::start().await;
    let mut events = agent
        .exec(shell(&format!("head -c {SIZE} /dev/zero; echo end")))
        .await
        .unwrap();
    // Nothing is read until the command has filled every buffer on the way and stands still.
    let mut peak = agent.memory("VmHWM");
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        peak = peak.max(agent.memory("VmHWM"));
    }
    let mut bytes = 0;
    let mut tail = Vec::new();
    let mut last = None;
    while let Some(event) = events.message().await.unwrap() {
        if let Some(Event::Stdout(data)) = &event.event {
            assert!(data.len() <= 16 << 10);
            bytes += data.len();
            tail = data.to_vec();
        }
        last = event.event;
        peak = peak.max(agent.memory("VmHWM"));
    }
    assert_eq!((bytes, last), (SIZE + 4, Some(Event::ExitCode(0))));
    assert!(tail.ends_with(b"end\n"));
    assert!(peak < 24 << 10, "the agent grew to {peak} KiB");
}

#[tokio::test]
async fn the_last_words_of_a_command_are_not_lost() {
    let agent = Agent::start().await;
    for _ in 0..50 {
        let transcript = agent
            .shell("head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2")
            .await;
        assert_eq!((transcript.stdout.len(), transcript.stderr.len()), (60_000, 60_000));
    }
}

#[tokio::test]
async fn a_stream_ends_with_its_command_not_with_what_it_left_behind() {
    let agent = Agent::start().await;
    let transcript = agent.shell("sleep 1000 & echo $!").await;
    assert_eq!(transcript.end, Event::ExitCode(0));
    let left = transcript.out().trim().to_owned();
    assert!(alive(&left), "a background process is not killed");
    assert_eq!(agent.shell(&format!("kill -KILL {left}")).await.end, Event::ExitCode(0));
}

#[tokio::test]
async fn a_client_that_vanishes_takes_the_process_group_along() {
    let agent = Agent::start().await;
    for script in ["sleep 1000 & echo $$ $!; wait", "yes & echo $$ $! >&2; wait"] {
        let mut events = agent.exec(shell(script)).await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"\n") {
            match events.message().await.unwrap().unwrap().event {
                Some(Event::Stdout(data)) if script.contains("sleep") => seen.extend(data),
                Some(Event::Stderr(data)) => seen.extend(data),
                _ => {}
            }
        }
        let line = String::from_utf8(seen).unwrap();
        let pids: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(pids.len(), 2, "{line}");
        assert!(alive(pids[0]));
        drop(events);
        // The shell is the agent's child and reaped by it; its own children go to whoever adopts orphans here.
        eventually("the shell's end", || !alive(pids[0])).await;
        eventually("its child's end", || running(pids[1]).is_none()).await;
    }
    agent.client().ping(PingRequest {}).await.unwrap();
}

#[tokio::test]
async fn a_command_does_not_outlive_its_agent() {
    let agent = Agent::start().await;
    let users = if is_root() { ["", "4711"] } else { ["", ""] };
    let (mut streams, mut pids) = (vec![], vec![]);
    for user in users {
        let request = ExecRequest {
            user: user.into(),
            ..shell("echo $$; exec sleep 1000")
        };
        let mut events = agent.exec(request).await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"\n") {
            let event = events.message().await.unwrap().unwrap();
            let Some(Event::Stdout(data)) = event.event else {
                panic!("{event:?}")
            };
            seen.extend(data);
        }
        streams.push(events);
        pids.push(String::from_utf8(seen).unwrap().trim().to_owned());
    }
    assert!(pids.iter().all(|pid| running(pid).is_some()));
    drop(agent);
    for pid in pids {
        eventually("the command's end", || running(&pid).is_none()).await;
    }
}

/// The process's state letter, unless it is gone or a zombie.
fn running(pid: &str) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit_once(") ")?.1.chars().next()?;
    (state != 'Z').then_some(state)
}

#[tokio::test]
async fn a_thousand_commands_run_side_by_side_on_one_connection() {
    const COUNT: i32 = 1000;
    let agent = Agent::start().await;
    let limit = std::fs::read_to_string("/proc/self/limits").unwrap();
    let ordinary = open_files(&limit);
    let mut runs = tokio::task::JoinSet::new();
    // All wait for input, so all are there at once before the first one ends.
    let barrier = Arc::new(tokio::sync::Barrier::new(usize::try_from(COUNT).unwrap()));
    for number in 0..COUNT {
        let (mut client, barrier, ordinary) = (agent.client(), barrier.clone(), ordinary.clone());
        runs.spawn(async move {
            let script = format!(
                "ulimit -Sn; ulimit -Hn; read line; echo $line >&2; exit {}",
                number % 100
            );
            let mut events = client.exec(shell(&script)).await.unwrap().into_inner();
            let mut live = Live::new(&mut events).await;
            live.until_out(&ordinary).await;
            barrier.wait().await;
            live.write(&mut client, format!("{number}\n").as_bytes()).await.unwrap();
            let end = live.finish().await;
            assert_eq!(live.err, format!("{number}\n").as_bytes());
            assert_eq!(end, Event::ExitCode(number % 100));
        });
    }
    while let Some(run) = runs.join_next().await {
        run.unwrap();
    }
    let fds = || {
        std::fs::read_dir(format!("/proc/{}/fd", agent.process.id()))
            .unwrap()
            .count()
    };
    eventually("no descriptor left open", || fds() < 30).await;
}

/// The soft and the hard limit of open files, a line each, in `/proc/<pid>/limits`.
fn open_files(limits: &str) -> String {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .unwrap();
    line.split_whitespace()
        .take(2)
        .fold(String::new(), |all, value| all + value + "\n")
}

/// A stream under way: what came until now.
struct Live<'a> {
    events: &'a mut Streaming<ExecEvent>,
    exec_id: u64,
    out: Vec<u8>,
    err: Vec<u8>,
    end: Option<Event>,
}

impl<'a> Live<'a> {
    async fn new(events: &'a mut Streaming<ExecEvent>) -> Self {
        let first = events.message().await.unwrap().unwrap();
        assert_ne!(first.exec_id, 0);
        Self {
            events,
            exec_id: first.exec_id,
            out: vec![],
            err: vec![],
            end: None,
        }
    }

    /// Takes the next event; false at the end.
    async fn next(&mut self) -> bool {
        let event = tokio::time::timeout(LIMIT, self.events.message())
            .await
            .expect("an event");
        let Some(event) = event.unwrap() else { return false };
        match event.event.unwrap() {
            Event::Stdout(data) => self.out.extend(data),
            Event::Stderr(data) => self.err.extend(data),
            last => self.end = Some(last),
        }
        true
    }

    async fn until_out(&mut self, wanted: &str) {
        while !String::from_utf8_lossy(&self.out).contains(wanted) {
            let more = self.next().await;
            assert!(
                more,
                "{wanted:?} never came in {:?}",
                String::from_utf8_lossy(&self.out)
            );
        }
    }

    async fn finish(&mut self) -> Event {
        while self.next().await {}
        self.end.clone().expect("a last event")
    }

    async fn write(&self, client: &mut AgentServiceClient<Channel>, data: &[u8]) -> Result<(), Status> {
        let request = StdinWriteRequest {
            exec_id: self.exec_id,
            data: Bytes::copy_from_slice(data),
            metadata: None,
        };
        client.stdin_write(request).await.map(|_| ())
    }

    async fn close(&self, client: &mut AgentServiceClient<Channel>) -> Result<(), Status> {
        let request = StdinCloseRequest {
            exec_id: self.exec_id,
            metadata: None,
        };
        client.stdin_close(request).await.map(|_| ())
    }

    async fn signal(&self, client: &mut AgentServiceClient<Channel>, signal: i32) -> Result<(), Status> {
        let request = SignalRequest {
            exec_id: self.exec_id,
            signal,
            metadata: None,
        };
        client.signal(request).await.map(|_| ())
    }

    async fn resize(&self, client: &mut AgentServiceClient<Channel>, rows: u32, cols: u32) -> Result<(), Status> {
        let request = ResizeExecPtyRequest {
            exec_id: self.exec_id,
            rows,
            cols,
            metadata: None,
        };
        client.resize_exec_pty(request).await.map(|_| ())
    }
}

fn on_terminal(script: &str) -> ExecRequest {
    ExecRequest {
        allocate_pty: true,
        ..shell(script)
    }
}

fn with_key(key: &str, mut request: ExecRequest) -> ExecRequest {
    request.metadata.as_mut().unwrap().idempotency_key = key.into();
    request
}

#[tokio::test]
async fn input_arrives_whole_and_ends_when_closed() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let mut events = agent.exec(request("cat", &[])).await.unwrap();
    let mut live = Live::new(&mut events).await;
    live.write(&mut client, b"one\n").await.unwrap();
    live.until_out("one\n").await;
    live.write(&mut client, b"two").await.unwrap();
    live.close(&mut client).await.unwrap();
    assert_eq!(live.finish().await, Event::ExitCode(0));
    assert_eq!(live.out, b"one\ntwo");
    let late = live.write(&mut client, b"three").await.unwrap_err();
    assert_eq!(late.code(), Code::NotFound);
    assert!(late.message().contains(&live.exec_id.to_string()), "{late:?}");
    assert_eq!(live.signal(&mut client, 15).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(live.close(&mut client).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(live.resize(&mut client, 1, 1).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn closed_input_takes_no_more() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let mut events = agent.exec(shell("cat; echo read; sleep 1000")).await.unwrap();
    let mut live = Live::new(&mut events).await;
    live.close(&mut client).await.unwrap();
    live.close(&mut client).await.unwrap();
    live.until_out("read").await;
    let refused = live.write(&mut client, b"x").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("StdinClose"), "{refused:?}");
    // The same when the command itself closes it.
    let mut events = agent.exec(shell("exec <&-; echo closed; sleep 1000")).await.unwrap();
    let mut live = Live::new(&mut events).await;
    live.until_out("closed").await;
    let refused = live.write(&mut client, b"x").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("by the command"), "{refused:?}");
}

#[tokio::test]
async fn input_that_nobody_reads_holds_up_its_own_call_only() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let mut events = agent.exec(shell("sleep 1000 & wait")).await.unwrap();
    let mut live = Live::new(&mut events).await;
    let write = |data: Vec<u8>| {
        let (mut client, exec_id) = (agent.client(), live.exec_id);
        tokio::spawn(async move {
            let data = data.into();
            client
                .stdin_write(StdinWriteRequest {
                    exec_id,
                    data,
                    metadata: None,
                })
                .await
        })
    };
    let stuck = [write(vec![b'x'; 3 << 20]), write(vec![b'y'; 3 << 20])];
    assert_eq!(agent.shell("echo alive").await.out(), "alive\n");
    assert!(stuck.iter().all(|call| !call.is_finished()));
    // 64 MiB may wait in all.
    let more: Vec<_> = (0..30).map(|_| write(vec![0; 3 << 20])).collect();
    let mut refused = 0;
    for call in more {
        if let Ok(answer) = tokio::time::timeout(Duration::from_millis(100), call).await {
            let status = answer.unwrap().unwrap_err();
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            refused += 1;
        }
    }
    assert!(refused > 0);
    live.signal(&mut client, 9).await.unwrap();
    for call in stuck {
        let status = call.await.unwrap().unwrap_err();
        assert!(
            [Code::NotFound, Code::FailedPrecondition].contains(&status.code()),
            "{status:?}"
        );
    }
    assert_eq!(live.finish().await, Event::ExitCode(137));
}

#[tokio::test]
async fn a_signal_reaches_the_process_group() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let mut events = agent
        .exec(shell("sleep 1000 & echo $!; wait; echo gone"))
        .await
        .unwrap();
    let mut live = Live::new(&mut events).await;
    live.until_out("\n").await;
    let child = String::from_utf8(live.out.clone()).unwrap().trim().to_owned();
    for number in [0, -1, 65, 1000] {
        assert_eq!(
            live.signal(&mut client, number).await.unwrap_err().code(),
            Code::InvalidArgument
        );
    }
    assert!(running(&child).is_some());
    live.signal(&mut client, 15).await.unwrap();
    assert_eq!(live.finish().await, Event::ExitCode(143));
    eventually("the child's end", || running(&child).is_none()).await;
    let unknown = SignalRequest {
        exec_id: 1 << 60,
        signal: 15,
        metadata: None,
    };
    assert_eq!(client.signal(unknown).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_terminal_is_a_real_one() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let request = ExecRequest {
        term_rows: 33,
        term_cols: 111,
        ..on_terminal(
            "test -t 0 && test -t 1 && test -t 2 && test -e /dev/tty && echo t >/dev/tty; stty size; echo $TERM; \
             ps -o sid= -p $$ | grep -w $$; trap 'stty size; exit 4' WINCH; echo ready >&2; while :; do sleep 0.1; done",
        )
    };
    let mut events = agent.exec(request).await.unwrap();
    let mut live = Live::new(&mut events).await;
    live.until_out("ready").await;
    let text = String::from_utf8(live.out.clone()).unwrap();
    assert!(text.starts_with("t\r\n33 111\r\nxterm\r\n"), "{text:?}");
    assert!(live.err.is_empty(), "all of a terminal's output is stdout");
    assert_eq!(
        live.resize(&mut client, 0, 80).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    live.resize(&mut client, 44, 99).await.unwrap();
    live.until_out("44 99").await;
    assert_eq!(live.finish().await, Event::ExitCode(4));
    let request = ExecRequest {
        env: BTreeMap::from([("TERM".into(), "dumb".into())]),
        ..on_terminal("stty size; echo $TERM")
    };
    let plain = Transcript::of(agent.exec(request).await.unwrap()).await;
    assert_eq!(plain.out(), "24 80\r\ndumb\r\n");
}

#[tokio::test]
async fn a_terminal_takes_keys() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    // ^C ends what is in the foreground; a shell with a trap sees it too.
    let mut events = agent
        .exec(on_terminal("trap 'echo caught' INT; echo up; sleep 1000; cat; echo $?"))
        .await
        .unwrap();
    let mut live = Live::new(&mut events).await;
    live.until_out("up").await;
    live.write(&mut client, b"\x03").await.unwrap();
    live.until_out("caught").await;
    live.write(&mut client, b"line\nhalf").await.unwrap();
    live.until_out("line\r\nhalfline\r\n").await;
    // StdinClose is ^D, also in the middle of a line.
    live.close(&mut client).await.unwrap();
    assert_eq!(live.finish().await, Event::ExitCode(0));
    assert!(
        live.out.ends_with(b"half0\r\n"),
        "{:?}",
        String::from_utf8_lossy(&live.out)
    );
    let mut events = agent.exec(on_terminal("cat; echo $?; sleep 1000")).await.unwrap();
    let mut live = Live::new(&mut events).await;
    live.close(&mut client).await.unwrap();
    live.until_out("0\r\n").await;
    assert_eq!(
        live.write(&mut client, b"x").await.unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[tokio::test]
async fn a_signal_also_reaches_the_foreground_of_a_terminal() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    // With job control the inner command is a group of its own.
    let mut events = agent
        .exec(on_terminal("set -m; sh -c 'echo $$ up; sleep 1000'; echo after"))
        .await
        .unwrap();
    let mut live = Live::new(&mut events).await;
    live.until_out("up").await;
    let pid = String::from_utf8(live.out.clone())
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    live.signal(&mut client, 9).await.unwrap();
    assert_eq!(live.finish().await, Event::ExitCode(137));
    eventually("the foreground's end", || running(&pid).is_none()).await;
    // The same when the client goes away.
    let mut events = agent
        .exec(on_terminal("set -m; sh -c 'echo $$ up; sleep 1000'; echo after"))
        .await
        .unwrap();
    let mut live = Live::new(&mut events).await;
    live.until_out("up").await;
    let pid = String::from_utf8(live.out.clone())
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    drop(events);
    eventually("the foreground's end", || running(&pid).is_none()).await;
}

#[tokio::test]
async fn the_last_words_on_a_terminal_are_not_lost() {
    let agent = Agent::start().await;
    for _ in 0..20 {
        let transcript = Transcript::of(
            agent
                .exec(on_terminal("head -c 60000 /dev/zero; printf end"))
                .await
                .unwrap(),
        )
        .await;
        assert_eq!(transcript.stdout.len(), 60_003);
        assert!(transcript.stdout.ends_with(b"end"));
    }
}

#[tokio::test]
async fn a_key_answers_exec_again() {
    let agent = Agent::start().await;
    let count = agent.directory.join("count");
    let script = format!("echo out; echo err >&2; echo x >>{}; exit 3", count.display());
    let (mut outputs, mut ids) = (vec![], vec![]);
    for _ in 0..2 {
        let transcript = Transcript::of(agent.exec(with_key("once", shell(&script))).await.unwrap()).await;
        assert_eq!(transcript.end, Event::ExitCode(3));
        outputs.push((transcript.stdout, transcript.stderr));
        ids.push(transcript.exec_id);
    }
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(ids[0], ids[1]);
    assert_eq!(std::fs::read(&count).unwrap(), b"x\n");
    let other = agent.exec(with_key("once", shell("true"))).await.unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument);
    let mut retried = with_key("once", shell(&script));
    retried.metadata.as_mut().unwrap().request_id = "request-8".into();
    let event = agent.exec(retried).await.unwrap().message().await.unwrap().unwrap();
    assert_eq!(event.request_id, "request-8");
}

#[tokio::test]
async fn a_second_call_follows_a_command_that_still_runs() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let request = with_key("once", shell("echo first; read line; echo $line; exit 5"));
    let mut first = agent.exec(request.clone()).await.unwrap();
    let mut live = Live::new(&mut first).await;
    live.until_out("first").await;
    let second = agent.exec(request.clone()).await.unwrap();
    // The connection that started it is lost, and the command goes on.
    drop(first);
    let third = agent.exec(request).await.unwrap();
    let mut second = second;
    let mut live = Live::new(&mut second).await;
    live.write(&mut client, b"second\n").await.unwrap();
    assert_eq!(live.finish().await, Event::ExitCode(5));
    assert_eq!(live.out, b"first\nsecond\n");
    let third = Transcript::of(third).await;
    assert_eq!(third.out(), "first\nsecond\n");
    assert_eq!(third.end, Event::ExitCode(5));
}

#[tokio::test]
async fn more_output_than_is_kept_is_not_repeated_and_not_run_again() {
    let agent = Agent::start().await;
    let request = with_key("once", shell("head -c 3000000 /dev/zero"));
    let transcript = Transcript::of(agent.exec(request.clone()).await.unwrap()).await;
    assert_eq!(transcript.stdout.len(), 3_000_000);
    let again = agent.exec(request).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    assert!(again.message().contains("\"once\""), "{again:?}");
}

#[tokio::test]
async fn a_key_writes_once() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let mut events = agent.exec(request("cat", &[])).await.unwrap();
    let mut live = Live::new(&mut events).await;
    for _ in 0..3 {
        let request = StdinWriteRequest {
            exec_id: live.exec_id,
            data: Bytes::from_static(b"once"),
            metadata: Some(TransportMetadata {
                request_id: String::new(),
                idempotency_key: "w".into(),
            }),
        };
        client.stdin_write(request).await.unwrap();
    }
    live.close(&mut client).await.unwrap();
    live.finish().await;
    assert_eq!(live.out, b"once");
}

#[tokio::test]
async fn resource_stats_are_the_machines() {
    let agent = Agent::start().await;
    let stats = || async {
        agent
            .client()
            .resource_stats(ResourceStatsRequest {})
            .await
            .unwrap()
            .into_inner()
    };
    let first = stats().await;
    assert!(first.memory_used_bytes > 0 && first.memory_used_bytes < first.memory_total_bytes);
    assert!(first.disk_used_bytes > 0 && first.disk_used_bytes <= first.disk_total_bytes);
    assert!(first.process_count >= 2);
    assert_eq!(first.load_average.len(), 3);
    assert!((0.0..=100.0).contains(&first.cpu_usage_percent));
    // A busy loop uses at least something of all processors' time, and then the guest did not rest since the last call.
    let mut events = agent.exec(shell("while :; do :; done")).await.unwrap();
    Live::new(&mut events).await;
    let mut busy = 0.0;
    let start = Instant::now();
    while busy <= 0.0 {
        assert!(start.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(200)).await;
        busy = stats().await.cpu_usage_percent;
    }
    assert!(busy <= 100.0);
}
