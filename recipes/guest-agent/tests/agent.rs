//! Drives the real binary over a Unix socket, as a host would over vsock.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use prost::bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use vz_guest_agent::proto::agent_service_client::AgentServiceClient;
use vz_guest_agent::proto::exec_event::Event;
use vz_guest_agent::proto::{
    ExecEvent, ExecRequest, PingRequest, ResourceStatsRequest, SignalRequest, StdinWriteRequest, SystemInfoRequest,
    TransportMetadata,
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
    let (mut stream, _) = tokio::time::timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
    let mut line = String::new();
    stream.read_to_string(&mut line).await.unwrap();
    assert_eq!(line, format!("ready {} 1\n", env!("CARGO_PKG_VERSION")));
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
        ..shell(":")
    };
    assert_eq!(agent.exec(terminal).await.unwrap_err().code(), Code::Unimplemented);
    let mut keyed = shell(":");
    keyed.metadata.as_mut().unwrap().idempotency_key = "once".into();
    assert_eq!(agent.exec(keyed).await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn environment_and_directory_are_the_requests() {
    let agent = Agent::start().await;
    let request = ExecRequest {
        env: BTreeMap::from([("GREETING".into(), "hello".into())]),
        working_dir: "/usr".into(),
        ..shell("pwd; echo $GREETING; echo ${AGENTS_OWN-unset}; echo $PATH; cat; readlink /proc/self/fd/0")
    };
    let transcript = Transcript::of(agent.exec(request).await.unwrap()).await;
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(transcript.out(), format!("/usr\nhello\nunset\n{path}\n/dev/null\n"));
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
async fn commands_run_side_by_side() {
    let agent = Agent::start().await;
    let runs: Vec<_> = (0..40)
        .map(|number| {
            let client = agent.client();
            tokio::spawn(async move {
                let mut client = client;
                let script = format!("head -c 100000 /dev/zero; exit {number}");
                Transcript::of(client.exec(shell(&script)).await.unwrap().into_inner()).await
            })
        })
        .collect();
    for (number, run) in runs.into_iter().enumerate() {
        let transcript = run.await.unwrap();
        assert_eq!(transcript.stdout.len(), 100_000);
        assert_eq!(transcript.end, Event::ExitCode(i32::try_from(number).unwrap()));
    }
}

#[tokio::test]
async fn the_rest_of_the_contract_is_refused_in_a_sentence() {
    let agent = Agent::start().await;
    let mut client = agent.client();
    let refusals = [
        client.resource_stats(ResourceStatsRequest {}).await.unwrap_err(),
        client.stdin_write(StdinWriteRequest::default()).await.unwrap_err(),
        client.signal(SignalRequest::default()).await.unwrap_err(),
    ];
    for refusal in refusals {
        assert_eq!(refusal.code(), Code::Unimplemented);
        assert!(refusal.message().contains("does not serve"), "{refusal:?}");
    }
}
