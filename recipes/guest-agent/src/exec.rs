//! Runs one command and turns its life into a stream of events.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, Signal, killpg, signal};
use nix::unistd::Pid;
use prost::bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tonic::Status;

use crate::not_served;
use crate::proto::exec_event::Event;
use crate::proto::{ExecEvent, ExecRequest};
use crate::user::User;

/// Bytes of output in one event.
const CHUNK: usize = 16 * 1024;

/// Events that wait for a slow client. A full queue leaves the output in the command's pipes, and then the command
/// waits: so a command holds at most `QUEUE * CHUNK` bytes here, whatever it prints.
const QUEUE: usize = 8;

/// Where commands are looked for when the request's environment has no `PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The events of one command; dropping it kills the command's process group.
pub type Events = mpsc::Receiver<Result<ExecEvent, Status>>;

/// Starts the command and returns its events, the first of which is there at once and carries `exec_id`.
///
/// A command that cannot start is an event, `error`. The stream ends with the command itself: what it leaves running
/// in the background is neither waited for nor killed.
///
/// # Errors
/// `INVALID_ARGUMENT` for a request that means nothing, `UNIMPLEMENTED` for what is not served.
pub fn run(exec_id: u64, request: ExecRequest) -> Result<Events, Status> {
    check(&request)?;
    let metadata = request.metadata.clone().unwrap_or_default();
    let (queue, receiver) = mpsc::channel(QUEUE);
    let stream = Stream {
        queue,
        sequence: 0,
        request_id: metadata.request_id,
        exec_id,
    };
    tokio::spawn(async move {
        // A client that is gone needs no answer.
        let _ = follow(stream, &request).await;
    });
    Ok(receiver)
}

fn check(request: &ExecRequest) -> Result<(), Status> {
    if request.command.is_empty() {
        return Err(Status::invalid_argument("Exec wants a command"));
    }
    if let Some(name) = request.env.keys().find(|name| name.is_empty() || name.contains('=')) {
        return Err(Status::invalid_argument(format!(
            "{name:?} cannot name an environment variable"
        )));
    }
    if request.allocate_pty {
        return Err(not_served("Exec with a terminal"));
    }
    if request.metadata.as_ref().is_some_and(|m| !m.idempotency_key.is_empty()) {
        return Err(not_served("Exec with an idempotency key"));
    }
    Ok(())
}

/// The client no longer listens.
struct Gone;

/// Numbers events and queues them.
struct Stream {
    queue: mpsc::Sender<Result<ExecEvent, Status>>,
    sequence: u64,
    request_id: String,
    exec_id: u64,
}

impl Stream {
    async fn send(&mut self, event: Event) -> Result<(), Gone> {
        self.sequence += 1;
        let event = ExecEvent {
            event: Some(event),
            sequence: self.sequence,
            request_id: self.request_id.clone(),
            exec_id: if self.sequence == 1 { self.exec_id } else { 0 },
        };
        self.queue.send(Ok(event)).await.map_err(|_| Gone)
    }
}

async fn follow(mut stream: Stream, request: &ExecRequest) -> Result<(), Gone> {
    let mut child = match spawn(request) {
        Ok(child) => child,
        Err(problem) => return stream.send(Event::Error(problem)).await,
    };
    let Ok(status) = relay(&mut stream, &mut child).await else {
        kill(&mut child).await;
        return Err(Gone);
    };
    match status {
        Ok(status) => stream.send(Event::ExitCode(exit_code(status))).await,
        Err(error) => {
            kill(&mut child).await;
            let lost = Status::internal(format!("the command's end could not be awaited: {error}"));
            stream.queue.send(Err(lost)).await.map_err(|_| Gone)
        }
    }
}

fn spawn(request: &ExecRequest) -> Result<Child, String> {
    let user = User::find(&request.user)?;
    let mut command = Command::new(&request.command);
    command
        .args(&request.args)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", &user.home)
        .env("USER", &user.name)
        .envs(&request.env)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if !request.working_dir.is_empty() {
        // Without this the kernel's answer is the same as for a command that is not there.
        if !Path::new(&request.working_dir).is_dir() {
            return Err(format!("{:?} is not a directory in the guest", request.working_dir));
        }
        command.current_dir(&request.working_dir);
    }
    let mut assume = (!request.user.is_empty()).then(|| user.assume());
    let between_fork_and_exec = move || {
        if let Some(assume) = &mut assume {
            assume()?;
        }
        // Nobody could read a command's output any more, or end it, once its agent is gone. After `assume`, since
        // the kernel forgets this with a change of user.
        set_pdeathsig(Signal::SIGKILL)?;
        // The shell that started the agent in its background made it ignore these, and a command would inherit that.
        for ignored in [Signal::SIGINT, Signal::SIGQUIT] {
            // SAFETY: no handler of ours is replaced, and the default one runs no code of ours.
            unsafe { signal(ignored, SigHandler::SigDfl) }?;
        }
        Ok(())
    };
    // SAFETY: the function only makes system calls, on data made before the fork.
    unsafe { command.pre_exec(between_fork_and_exec) };
    command
        .spawn()
        .map_err(|error| format!("{:?} could not start: {error}", request.command))
}

/// Passes output on until the command has ended.
async fn relay(stream: &mut Stream, child: &mut Child) -> Result<io::Result<ExitStatus>, Gone> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut out, mut err) = (vec![0; CHUNK], vec![0; CHUNK]);
    // So that a client knows the exec_id of a command that prints nothing.
    stream.send(Event::Stdout(Bytes::new())).await?;
    let queue = stream.queue.clone();
    let status = loop {
        tokio::select! {
            chunk = read(&mut stdout, &mut out) => if let Some(chunk) = chunk {
                stream.send(Event::Stdout(chunk)).await?;
            },
            chunk = read(&mut stderr, &mut err) => if let Some(chunk) = chunk {
                stream.send(Event::Stderr(chunk)).await?;
            },
            status = child.wait() => break status,
            () = queue.closed() => return Err(Gone),
        }
    };
    if let Some(pipe) = stdout {
        for chunk in left_over(&pipe) {
            stream.send(Event::Stdout(chunk)).await?;
        }
    }
    if let Some(pipe) = stderr {
        for chunk in left_over(&pipe) {
            stream.send(Event::Stderr(chunk)).await?;
        }
    }
    Ok(status)
}

/// The next chunk. At the end `pipe` becomes `None`, and from then on this never returns.
async fn read<R: AsyncRead + Unpin>(pipe: &mut Option<R>, buffer: &mut [u8]) -> Option<Bytes> {
    let Some(reader) = pipe else {
        return std::future::pending().await;
    };
    if let Ok(length @ 1..) = reader.read(buffer).await {
        return Some(Bytes::copy_from_slice(&buffer[..length]));
    }
    // The end; a pipe has no errors of its own.
    *pipe = None;
    None
}

/// What an ended command left in its pipe, at most what a pipe holds. A background process may keep the pipe open
/// and go on writing: neither its end nor its output is waited for.
fn left_over(pipe: &impl AsFd) -> impl Iterator<Item = Bytes> {
    let capacity = fcntl(pipe, FcntlArg::F_GETPIPE_SZ).unwrap_or(0);
    let mut left = usize::try_from(capacity).unwrap_or(0);
    std::iter::from_fn(move || {
        let mut chunk = vec![0; CHUNK.min(left)];
        // The descriptor does not block; no data is an error like any other.
        let length = nix::unistd::read(pipe, &mut chunk).unwrap_or(0);
        left -= length;
        chunk.truncate(length);
        (length > 0).then(|| chunk.into())
    })
}

/// Ends the command and all of its process group, and reaps it.
async fn kill(child: &mut Child) {
    // The id is there as long as the child is not reaped, so it cannot be another process's yet.
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        let _ = child.wait().await;
    }
}

/// A shell's convention: 128+N for a command that signal N ended.
fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_128_and_its_number() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn requests_that_mean_nothing_are_refused() {
        let with = |change: fn(&mut ExecRequest)| {
            let mut request = ExecRequest {
                command: "true".into(),
                ..ExecRequest::default()
            };
            change(&mut request);
            check(&request).unwrap_err().code()
        };
        assert_eq!(with(|r| r.command.clear()), tonic::Code::InvalidArgument);
        assert_eq!(
            with(|r| drop(r.env.insert("a=b".into(), String::new()))),
            tonic::Code::InvalidArgument
        );
        assert_eq!(with(|r| r.allocate_pty = true), tonic::Code::Unimplemented);
    }
}
