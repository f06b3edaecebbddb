//! The commands that run: each one's life as a stream of events, and what a client does to it by its `exec_id`.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, killpg};
use nix::sys::termios::{SpecialCharacterIndices, tcgetattr};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, tcgetpgrp};
use prost::bytes::Bytes;
use tokio::process::Child;
use tokio::sync::watch;
use tonic::{Request, Status};

use crate::aside::aside;
use crate::channel::Channel;
use crate::command::{self, Started, Streams};
use crate::feed::{Events, Feed, Publisher};
use crate::idempotency::{Calls, identity};
use crate::proto::exec_event::Event;
use crate::proto::{ExecRequest, ResizeExecPtyRequest, SignalRequest, StdinCloseRequest, StdinWriteRequest};

/// Bytes that may wait, in all, for commands to read them.
const WAITING_INPUT: usize = 64 << 20;

/// All commands under way. A clone is another handle.
#[derive(Clone)]
pub struct Commands(Arc<Shared>);

struct Shared {
    /// Ids up to this one were never given out, or by an earlier agent.
    before_first: u64,
    last_id: AtomicU64,
    running: Mutex<HashMap<u64, Arc<Running>>>,
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
        // No agent starts a thousand commands per millisecond.
        let before_first = u64::try_from(uptime.as_millis()).unwrap_or(0) * 1000;
        Self(Arc::new(Shared {
            before_first,
            last_id: AtomicU64::new(before_first),
            running: Mutex::default(),
            waiting_input: AtomicUsize::new(0),
        }))
    }
}

impl Commands {
    /// Starts the command and returns its events, the first of which is there at once and carries the `exec_id`.
    ///
    /// A command that cannot start is an event, `error`. The stream ends with the command itself: what it leaves
    /// running in the background is neither waited for nor killed. Dropping the stream kills the command's process
    /// group. A second call with the same idempotency key, on the same connection, follows the first one's command.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a request that means nothing.
    pub fn run(&self, request: Request<ExecRequest>) -> Result<Events, Status> {
        let calls = Calls::of(&request).commands;
        let mut request = request.into_inner();
        check(&request)?;
        let request_id = request.metadata.as_ref().map(|metadata| metadata.request_id.clone());
        let request_id = request_id.unwrap_or_default();
        let identity = identity("Exec", &mut request);
        let first = identity.and_then(|identity| calls.find(identity));
        if let Some(events) = first.and_then(|feed| feed.attach(request_id.clone())) {
            return Ok(events);
        }
        let (feed, events) = Feed::start(request_id);
        let ticket = identity.and_then(|identity| calls.remember(identity, feed.clone()));
        let exec_id = self.0.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let publisher = Publisher::new(feed.clone(), ticket, exec_id);
        let commands = self.clone();
        tokio::spawn(async move { commands.follow(request, exec_id, publisher, &feed).await });
        Ok(events)
    }

    async fn follow(&self, request: ExecRequest, exec_id: u64, mut publisher: Publisher, feed: &Feed) {
        let started = tokio::select! {
            started = aside(move || command::start(&request)) => started,
            () = feed.abandoned() => return publisher.forget(),
        };
        let (Started { mut child, streams }, _thread) = match started {
            Ok((Ok(started), thread)) => (started, thread),
            Ok((Err(problem), _)) => return publisher.send(Event::Error(problem)).await,
            Err(error) => return publisher.send(Event::Error(error.to_string())).await,
        };
        let (registered, output) = self.register(exec_id, &child, streams);
        let status = tokio::select! {
            status = relay(&mut publisher, &mut child, &output, registered) => status,
            () = feed.abandoned() => {
                publisher.forget();
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

    /// The command, `None` when it has ended.
    fn find(&self, exec_id: u64) -> Result<Option<Arc<Running>>, Status> {
        let running = self.running().get(&exec_id).cloned();
        let given_out = self.0.before_first + 1..=self.0.last_id.load(Ordering::Relaxed);
        if running.is_none() && !given_out.contains(&exec_id) {
            return Err(Status::not_found(format!("there is no command with exec_id {exec_id}")));
        }
        Ok(running)
    }

    /// Writes to the command's standard input, and returns when all of it is in the command's pipe or terminal.
    ///
    /// # Errors
    /// `NOT_FOUND` when there is no such command, or it has ended or ends meanwhile: then not all of the data has
    /// arrived. `FAILED_PRECONDITION` when its standard input is closed on either side, `RESOURCE_EXHAUSTED` when [`WAITING_INPUT`] bytes wait for commands already.
    pub async fn write(&self, request: StdinWriteRequest) -> Result<(), Status> {
        let StdinWriteRequest { exec_id, data, .. } = request;
        let ended = || Status::not_found(format!("the command with exec_id {exec_id} has ended"));
        let mut running = self.find(exec_id)?.ok_or_else(ended)?;
        let _waiting = Waiting::enter(&self.0.waiting_input, data.len())?;
        let written = running.until_end(async |stdin| stdin.write(exec_id, &data).await);
        written.await.unwrap_or_else(|| Err(ended()))
    }

    /// Ends the command's standard input, after what was written before. A terminal gets its end-of-file character, as
    /// if typed; what that means is the program's affair. Closing it again changes nothing, nor does it after the
    /// command's end.
    ///
    /// # Errors
    /// `NOT_FOUND` when there never was such a command.
    pub async fn close(&self, request: StdinCloseRequest) -> Result<(), Status> {
        if let Some(mut running) = self.find(request.exec_id)? {
            running.until_end(async |stdin| stdin.close().await).await;
        }
        Ok(())
    }

    /// Sends the signal to the command's process group, and on a terminal also to the group in the foreground; nobody
    /// gets it after the command's end.
    ///
    /// # Errors
    /// `NOT_FOUND` when there never was such a command, `INVALID_ARGUMENT` for what is no signal.
    pub fn signal(&self, request: &SignalRequest) -> Result<(), Status> {
        let number = request.signal;
        if !(1..=libc::SIGRTMAX()).contains(&number) {
            return Err(Status::invalid_argument(format!("{number} is no signal")));
        }
        let Some(running) = self.find(request.exec_id)? else {
            return Ok(());
        };
        let foreground = running.terminal.as_deref().and_then(foreground);
        for group in running
            .group
            .into_iter()
            .chain(foreground.filter(|_| foreground != running.group))
        {
            // SAFETY: no memory is passed. A command that `find` finds is not reaped, so the group is still its own.
            let sent = Errno::result(unsafe { libc::killpg(group.as_raw(), number) });
            // ESRCH: the foreground's last process ended just now.
            if let Err(error) = sent
                && error != Errno::ESRCH
            {
                return Err(Status::internal(format!("signal {number} cannot be sent: {error}")));
            }
        }
        Ok(())
    }

    /// Gives the command's terminal another size; after the command's end there is none, and nothing happens.
    ///
    /// # Errors
    /// `NOT_FOUND` when there never was such a command, `FAILED_PRECONDITION` when it has no terminal, `INVALID_ARGUMENT`
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
        let Some(running) = self.find(exec_id)? else {
            return Ok(());
        };
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

impl Running {
    /// What `use_stdin` says; `None` when the command ends before.
    async fn until_end<T>(self: &mut Arc<Self>, use_stdin: impl AsyncFnOnce(&mut Stdin) -> T) -> Option<T> {
        let mut end = self.end.clone();
        tokio::select! {
            answer = async { use_stdin(&mut *self.stdin.lock().await).await } => Some(answer),
            // Nothing is ever sent: this is the sender's end.
            _ = end.changed() => None,
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

    async fn close(&mut self) {
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
