//! The commands that run: each one's life as a stream of events, and what a client does to it by its `exec_id`.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{Signal, killpg};
use nix::sys::termios::{SpecialCharacterIndices, tcgetattr};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, tcgetpgrp};
use prost::bytes::Bytes;
use tokio::process::Child;
use tokio::sync::watch;
use tonic::Status;

use crate::channel::Channel;
use crate::command::{self, Started, Streams};
use crate::feed::{Events, Feed, Publisher};
use crate::idempotency::{Claim, Keys};
use crate::proto::exec_event::Event;
use crate::proto::{ExecRequest, ResizeExecPtyRequest, SignalRequest, StdinCloseRequest, StdinWriteRequest};

/// How long a command with an idempotency key runs on without a client, for one whose connection broke to come again.
const GRACE: Duration = Duration::from_secs(30);

/// Bytes that may wait, in all, for commands to read them.
const WAITING_INPUT: usize = 64 << 20;

/// All commands under way. A clone is another handle.
#[derive(Clone)]
pub struct Commands(Arc<Shared>);

struct Shared {
    last_id: AtomicU64,
    running: Mutex<HashMap<u64, Arc<Running>>>,
    calls: Keys<Feed>,
    waiting_input: AtomicUsize,
}

struct Running {
    /// Taken by one writer after the other, in the order of their calls.
    stdin: tokio::sync::Mutex<Stdin>,
    terminal: Option<Arc<Channel>>,
    group: Option<Pid>,
    /// Its sender is dropped at the command's end.
    end: watch::Receiver<()>,
}

enum Stdin {
    Pipe(Channel),
    /// The last byte that was written; at first as after a newline.
    Terminal(Arc<Channel>, u8),
    Closed,
}

impl Default for Commands {
    /// No command yet. The first `exec_id` depends on the time since boot, so that one that an earlier agent gave out
    /// does not become another command's.
    fn default() -> Self {
        let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        let millis = u64::try_from(uptime.as_millis()).unwrap_or(0);
        Self(Arc::new(Shared {
            // No agent starts a thousand commands per millisecond.
            last_id: AtomicU64::new(millis * 1000),
            running: Mutex::default(),
            calls: Keys::default(),
            waiting_input: AtomicUsize::new(0),
        }))
    }
}

impl Commands {
    /// Starts the command and returns its events, the first of which is there at once and carries the `exec_id`.
    ///
    /// A command that cannot start is an event, `error`. The stream ends with the command itself: what it leaves
    /// running in the background is neither waited for nor killed. Dropping the stream kills the command's process
    /// group; with an idempotency key only if nobody calls with it again within [`GRACE`].
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a request that means nothing or has another one's key, `ALREADY_EXISTS` for a second
    /// call whose first one's events are not kept.
    pub fn run(&self, mut request: ExecRequest) -> Result<Events, Status> {
        check(&request)?;
        let request_id = request.metadata.as_ref().map(|metadata| metadata.request_id.clone());
        let request_id = request_id.unwrap_or_default();
        let feed = Feed::default();
        let claim = self.0.calls.claim("Exec", &mut request, || feed.clone())?;
        let (ticket, grace) = match claim {
            Claim::Again(first) => return first.attach(request_id).ok_or_else(not_kept),
            Claim::First(ticket) => (Some(ticket), GRACE),
            Claim::Unkeyed => (None, Duration::ZERO),
        };
        let events = feed.attach(request_id).ok_or_else(not_kept)?;
        let exec_id = self.0.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let publisher = Publisher::new(feed.clone(), ticket, exec_id);
        let commands = self.clone();
        tokio::spawn(async move { commands.follow(&request, exec_id, publisher, &feed, grace).await });
        Ok(events)
    }

    async fn follow(
        &self,
        request: &ExecRequest,
        exec_id: u64,
        mut publisher: Publisher,
        feed: &Feed,
        grace: Duration,
    ) {
        let Started { mut child, streams } = match command::start(request) {
            Ok(started) => started,
            Err(problem) => return publisher.send(Event::Error(problem)).await,
        };
        let (registered, output) = self.register(exec_id, &child, streams);
        let status = tokio::select! {
            status = relay(&mut publisher, &mut child, &output, registered) => status,
            () = feed.abandoned(grace) => {
                kill(&mut child, output.terminal()).await;
                return;
            }
        };
        match status {
            Ok(status) => publisher.send(Event::ExitCode(exit_code(status))).await,
            Err(error) => {
                kill(&mut child, output.terminal()).await;
                let lost = Status::internal(format!("the command's end could not be awaited: {error}"));
                publisher.fail(lost).await;
            }
        }
    }

    fn register(&self, exec_id: u64, child: &Child, streams: Streams) -> (Registered, Output) {
        let (stdin, output) = match streams {
            Streams::Pipes { stdin, stdout, stderr } => (Stdin::Pipe(stdin), Output::Pipes(stdout, stderr)),
            Streams::Terminal(terminal) => (Stdin::Terminal(terminal.clone(), b'\n'), Output::Terminal(terminal)),
        };
        let (sender, end) = watch::channel(());
        let running = Arc::new(Running {
            stdin: stdin.into(),
            terminal: output.terminal().cloned(),
            group: group(child),
            end,
        });
        self.running().insert(exec_id, running);
        let registered = Registered {
            commands: self.clone(),
            exec_id,
            _end: sender,
        };
        (registered, output)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<u64, Arc<Running>>> {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, exec_id: u64) -> Result<Arc<Running>, Status> {
        self.running().get(&exec_id).cloned().ok_or_else(|| ended(exec_id))
    }

    /// Writes to the command's standard input, and returns when all of it is in the command's pipe or terminal.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is no such command or it ends meanwhile, `FAILED_PRECONDITION` when its standard input
    /// is closed on either side, `RESOURCE_EXHAUSTED` when [`WAITING_INPUT`] bytes wait for commands already.
    pub async fn write(&self, request: StdinWriteRequest) -> Result<(), Status> {
        let StdinWriteRequest { exec_id, data, .. } = request;
        let mut running = self.find(exec_id)?;
        let _waiting = Waiting::enter(&self.0.waiting_input, data.len())?;
        running
            .until_end(exec_id, async |stdin| stdin.write(exec_id, &data).await)
            .await
    }

    /// Ends the command's standard input, after what was written before. A terminal gets its end-of-file character, as
    /// if typed; what that means is the program's affair. Closing it again changes nothing.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is no such command or it ends meanwhile.
    pub async fn close(&self, request: StdinCloseRequest) -> Result<(), Status> {
        let exec_id = request.exec_id;
        let mut running = self.find(exec_id)?;
        running.until_end(exec_id, async |stdin| stdin.close().await).await
    }

    /// Sends the signal to the command's process group, and on a terminal also to the group in the foreground.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is no such command, `INVALID_ARGUMENT` for what is no signal.
    pub fn signal(&self, request: &SignalRequest) -> Result<(), Status> {
        let number = request.signal;
        if number < 1 {
            return Err(Status::invalid_argument(format!("{number} is no signal")));
        }
        let running = self.find(request.exec_id)?;
        let foreground = running.terminal.as_deref().and_then(foreground);
        for group in running
            .group
            .into_iter()
            .chain(foreground.filter(|_| foreground != running.group))
        {
            // SAFETY: no memory is passed. A command that `find` finds is not reaped, so the group is still its own.
            if unsafe { libc::killpg(group.as_raw(), number) } == -1 {
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINVAL) => return Err(Status::invalid_argument(format!("{number} is no signal"))),
                    // The foreground's last process ended just now.
                    Some(libc::ESRCH) => {}
                    _ => {
                        return Err(Status::internal(format!(
                            "signal {number}: {}",
                            io::Error::last_os_error()
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives the command's terminal another size.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is no such command, `FAILED_PRECONDITION` when it has no terminal, `INVALID_ARGUMENT`
    /// when a side is 0 or too long.
    pub fn resize(&self, request: &ResizeExecPtyRequest) -> Result<(), Status> {
        let ResizeExecPtyRequest {
            exec_id, rows, cols, ..
        } = *request;
        let side = |length: u32| u16::try_from(length).ok().filter(|length| *length > 0);
        let (Some(height), Some(width)) = (side(rows), side(cols)) else {
            return Err(Status::invalid_argument(format!(
                "a terminal of {rows} rows and {cols} columns is not possible"
            )));
        };
        let running = self.find(exec_id)?;
        let terminal = running.terminal.as_ref().ok_or_else(|| {
            Status::failed_precondition(format!("the command with exec_id {exec_id} runs without a terminal"))
        })?;
        command::resize(terminal, height, width)
            .map_err(|error| Status::internal(format!("the terminal could not be resized: {error}")))
    }
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
    if request.term_rows.max(request.term_cols) > u16::MAX.into() {
        return Err(Status::invalid_argument(format!(
            "a terminal of {} rows and {} columns is not possible",
            request.term_rows, request.term_cols
        )));
    }
    Ok(())
}

fn not_kept() -> Status {
    Status::already_exists("Exec was called with this idempotency key before, and its events are not kept")
}

fn ended(exec_id: u64) -> Status {
    Status::not_found(format!("no command with exec_id {exec_id} is running"))
}

impl Running {
    /// What `use_stdin` says, unless the command ends before.
    async fn until_end(
        self: &mut Arc<Self>,
        exec_id: u64,
        use_stdin: impl AsyncFnOnce(&mut Stdin) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let mut end = self.end.clone();
        tokio::select! {
            answer = async { use_stdin(&mut *self.stdin.lock().await).await } => answer,
            // Nothing is ever sent: this is the sender's end.
            _ = end.changed() => Err(ended(exec_id)),
        }
    }
}

impl Stdin {
    async fn write(&mut self, exec_id: u64, data: &[u8]) -> Result<(), Status> {
        let closed = |by| {
            Err(Status::failed_precondition(format!(
                "the standard input of the command with exec_id {exec_id} was closed by {by}"
            )))
        };
        let written = match self {
            Self::Pipe(pipe) => pipe.write(data).await,
            Self::Terminal(terminal, last) => {
                *last = *data.last().unwrap_or(last);
                terminal.write(data).await
            }
            Self::Closed => return closed("StdinClose"),
        };
        written.or_else(|_| closed("the command"))
    }

    async fn close(&mut self) -> Result<(), Status> {
        if let Self::Terminal(terminal, last) = self
            && let Ok(settings) = tcgetattr(&**terminal)
        {
            let end = settings.control_chars[SpecialCharacterIndices::VEOF as usize];
            // In the middle of a line the first one only hands that line over.
            let typed = [end, end];
            let typed = if *last == b'\n' || *last == b'\r' {
                &typed[..1]
            } else {
                &typed
            };
            // A terminal without a program needs none.
            let _ = terminal.write(typed).await;
        }
        *self = Self::Closed;
        Ok(())
    }
}

/// Input on its way, counted while it waits.
struct Waiting<'a> {
    total: &'a AtomicUsize,
    bytes: usize,
}

impl<'a> Waiting<'a> {
    fn enter(total: &'a AtomicUsize, bytes: usize) -> Result<Self, Status> {
        let waiting = Self { total, bytes };
        if total.fetch_add(bytes, Ordering::Relaxed) + bytes > WAITING_INPUT {
            return Err(Status::resource_exhausted(format!(
                "{} MiB of input wait for commands to read them",
                WAITING_INPUT >> 20
            )));
        }
        Ok(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Keeps a command findable. Dropping it ends every call that waits for the command to read.
struct Registered {
    commands: Commands,
    exec_id: u64,
    _end: watch::Sender<()>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.commands.running().remove(&self.exec_id);
    }
}

/// Where a command's output comes from.
enum Output {
    Pipes(Channel, Channel),
    Terminal(Arc<Channel>),
}

impl Output {
    fn terminal(&self) -> Option<&Arc<Channel>> {
        match self {
            Self::Pipes(..) => None,
            Self::Terminal(terminal) => Some(terminal),
        }
    }
}

/// Passes output on until the command has ended, and then what is left of it.
async fn relay(
    publisher: &mut Publisher,
    child: &mut Child,
    output: &Output,
    registered: Registered,
) -> io::Result<ExitStatus> {
    let (stdout, stderr) = match output {
        Output::Pipes(stdout, stderr) => (stdout, Some(stderr)),
        Output::Terminal(terminal) => (&**terminal, None),
    };
    // So that a client knows the exec_id of a command that prints nothing.
    publisher.send(Event::Stdout(Bytes::new())).await;
    let (mut more_out, mut more_err) = (Some(stdout), stderr);
    let status = loop {
        tokio::select! {
            chunk = next(&mut more_out) => if let Some(chunk) = chunk {
                publisher.send(Event::Stdout(chunk)).await;
            },
            chunk = next(&mut more_err) => if let Some(chunk) = chunk {
                publisher.send(Event::Stderr(chunk)).await;
            },
            status = child.wait() => break status,
        }
    };
    // At once: the process is reaped, and its number may become another's. The agent has one thread, so that nothing
    // came in between.
    drop(registered);
    for chunk in stdout.left_over() {
        publisher.send(Event::Stdout(chunk)).await;
    }
    for chunk in stderr.into_iter().flat_map(Channel::left_over) {
        publisher.send(Event::Stderr(chunk)).await;
    }
    status
}

/// The next chunk. At the end `channel` becomes `None`, and from then on this never returns.
async fn next(channel: &mut Option<&Channel>) -> Option<Bytes> {
    let Some(open) = channel else {
        return std::future::pending().await;
    };
    let chunk = open.read().await;
    if chunk.is_none() {
        *channel = None;
    }
    chunk
}

/// Ends the command and all of its process group, on a terminal the group in the foreground too, and reaps it.
async fn kill(child: &mut Child, terminal: Option<&Arc<Channel>>) {
    // The id is there as long as the child is not reaped, so it cannot be another process's yet.
    if let Some(own) = group(child) {
        for group in [Some(own), terminal.and_then(|terminal| foreground(terminal))] {
            let _ = group.map(|group| killpg(group, Signal::SIGKILL));
        }
        let _ = child.wait().await;
    }
}

/// The process group that a command leads, unless it is reaped.
fn group(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw)
}

/// The process group that a terminal's keys would reach, if there is one.
fn foreground(terminal: &Channel) -> Option<Pid> {
    tcgetpgrp(terminal).ok().filter(|group| group.as_raw() > 1)
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
        assert_eq!(with(|r| r.term_cols = 70_000), tonic::Code::InvalidArgument);
    }
}
