//! Runs a container, or a command in a running one, under youki as if it were this process: its standard streams or its
//! terminal, its signals, its exit code (128+N after signal N).
//!
//! `youki run` does not suffice: it may miss the end of a container that ends at once, it gives N in place of 128+N, and
//! it has nobody at the other end of a terminal. So youki only creates and starts here, and this process, which orphans
//! are given to (`PR_SET_CHILD_SUBREAPER`), waits.
//!
//! It also follows a container's log (`follow`) and waits for a process (`wait`), which a host can only do from here.
//!
//! In the container, `vz-oci-run init COMMAND…` becomes the command, after it has undone what youki leaves: SIGPIPE
//! ignored, which would make every pipeline end with errors.

mod follow;
mod relay;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use follow::Place;
use relay::Relay;

const USAGE: &str = "usage: vz-oci-run --youki FILE --state DIR run [--terminal] BUNDLE ID
       vz-oci-run --youki FILE --state DIR exec [--terminal] ID, the process.json in $VZ_OCI_PROCESS
       vz-oci-run follow LOG [INODE OFFSET]
       vz-oci-run wait PID MILLISECONDS
       vz-oci-run init COMMAND ARGUMENT…";

const PROCESS: &str = "VZ_OCI_PROCESS";

/// What Docker's tools say when the runtime, not the container, failed.
const RUNTIME_FAILED: u8 = 125;

/// Signals that are the container's business. SIGCHLD and SIGWINCH are ours.
const FORWARDED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCONT,
];

/// What is to be run: a whole container from its bundle, or a process (the runtime specification's, as JSON) in a
/// running one.
enum What {
    Run { bundle: PathBuf },
    Exec { process: OsString },
}

struct Job {
    youki: PathBuf,
    state: PathBuf,
    what: What,
    terminal: bool,
    id: String,
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [verb, command, arguments @ ..] = &words[..]
        && verb == "init"
    {
        return become_command(command, arguments);
    }
    if let Some(result) = watch(&words) {
        return result.unwrap_or_else(|sentence| {
            eprintln!("vz-oci-run: {sentence}");
            ExitCode::from(RUNTIME_FAILED)
        });
    }
    let Some(job) = parse(words) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match job.run() {
        Ok(code) => ExitCode::from(code),
        Err(sentence) => {
            eprintln!("vz-oci-run: {sentence}");
            ExitCode::from(RUNTIME_FAILED)
        }
    }
}

/// Returns only when it cannot be; the exit code is a shell's.
fn become_command(command: &OsStr, arguments: &[OsString]) -> ExitCode {
    // std resets SIGPIPE and the signal mask before it executes a command.
    let error = Command::new(command).args(arguments).exec();
    eprintln!("{}: {error}", command.display());
    ExitCode::from(if error.kind() == std::io::ErrorKind::NotFound {
        127
    } else {
        126
    })
}

/// `follow` and `wait`, if that is what the words say.
fn watch(words: &[OsString]) -> Option<Result<ExitCode, String>> {
    let number = |word: &OsString| word.to_str()?.parse::<u64>().ok();
    match (words.first()?.to_str()?, &words[1..]) {
        ("follow", [path, rest @ ..]) => {
            let place = match rest {
                [] => None,
                [inode, offset] => Some(Place {
                    inode: number(inode)?,
                    offset: number(offset)?,
                }),
                _ => return None,
            };
            let followed = follow::follow(Path::new(path), place.as_ref(), &mut std::io::stdout().lock());
            Some(match followed {
                Ok(()) => Ok(ExitCode::SUCCESS),
                Err(error) => Err(format!("{}: {error}", path.display())),
            })
        }
        ("wait", [pid, limit]) => Some(ends(i32::try_from(number(pid)?).ok()?, number(limit)?)),
        _ => None,
    }
}

/// Wait for the end of any process; the exit code is 1 when it still runs after so many milliseconds.
fn ends(pid: i32, milliseconds: u64) -> Result<ExitCode, String> {
    // SAFETY: no memory is passed.
    let opened = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) });
    let process = match opened {
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        Ok(number) => unsafe { OwnedFd::from_raw_fd(i32::try_from(number).unwrap_or(-1)) },
        Err(Errno::ESRCH) => return Ok(ExitCode::SUCCESS),
        Err(error) => return Err(format!("process {pid}: {error}")),
    };
    let limit = i32::try_from(milliseconds).unwrap_or(i32::MAX);
    let limit = PollTimeout::try_from(limit).map_err(|error| error.to_string())?;
    match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], limit) {
        Ok(count) => Ok(ExitCode::from(u8::from(count == 0))),
        Err(error) => Err(format!("poll: {error}")),
    }
}

fn parse(words: Vec<OsString>) -> Option<Job> {
    let mut words = words.into_iter().peekable();
    let mut option = |name: &str| (words.next()? == name).then(|| words.next()).flatten();
    let youki = PathBuf::from(option("--youki")?);
    let state = PathBuf::from(option("--state")?);
    let verb = words.next()?;
    let terminal = words.next_if(|word| word == "--terminal").is_some();
    let what = match verb.to_str()? {
        "run" => What::Run {
            bundle: PathBuf::from(words.next()?),
        },
        "exec" => What::Exec {
            process: std::env::var_os(PROCESS)?,
        },
        _ => return None,
    };
    let id = words.next()?.into_string().ok()?;
    words.next().is_none().then_some(Job {
        youki,
        state,
        what,
        terminal,
        id,
    })
}

impl Job {
    fn run(&self) -> Result<u8, String> {
        prctl::set_child_subreaper(true).map_err(|error| format!("prctl: {error}"))?;
        // Blocked before there is anything to signal, so that none is lost; std unblocks them in what it starts.
        let mut set = SigSet::empty();
        for signal in FORWARDED.into_iter().chain([Signal::SIGCHLD, Signal::SIGWINCH]) {
            set.add(signal);
        }
        set.thread_block().map_err(|error| format!("sigprocmask: {error}"))?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|error| format!("signalfd: {error}"))?;

        // Files of this one run, beside youki's own state.
        let own = self.state.join(format!("vz-oci-run-{}", std::process::id()));
        fs::create_dir_all(&own).map_err(|error| format!("{}: {error}", own.display()))?;
        let result = self.in_directory(&own, &signals);
        if matches!(self.what, What::Run { .. }) {
            // Removes the cgroup, and what is left of a container that could not be started.
            let _ = self
                .youki()
                .args(["delete", "--force", &self.id])
                .stderr(Stdio::null())
                .status();
        }
        let _ = fs::remove_dir_all(&own);
        result
    }

    fn in_directory(&self, own: &Path, signals: &SignalFd) -> Result<u8, String> {
        let pid_file = own.join("pid");
        let console = own.join("console");
        let mut listener = None;
        let mut create = self.youki();
        match &self.what {
            What::Run { bundle } => create.args(["create", "--bundle"]).arg(bundle),
            What::Exec { process } => {
                let file = own.join("process.json");
                fs::write(&file, process.as_bytes()).map_err(|error| format!("{}: {error}", file.display()))?;
                create.args(["exec", "--detach", "--process"]).arg(file)
            }
        };
        create.arg("--pid-file").arg(&pid_file);
        if self.terminal {
            let socket = UnixListener::bind(&console).map_err(|error| format!("{}: {error}", console.display()))?;
            create.arg("--console-socket").arg(&console).stdin(Stdio::null());
            listener = Some(socket);
        }
        succeed(create.arg(&self.id))?;
        let text = fs::read_to_string(&pid_file).map_err(|error| format!("{}: {error}", pid_file.display()))?;
        let pid = Pid::from_raw(
            text.trim()
                .parse()
                .map_err(|_| format!("youki says its pid is {text:?}"))?,
        );
        let relay = listener.map(|listener| Relay::accept(&listener)).transpose()?;
        if matches!(self.what, What::Run { .. }) {
            succeed(self.youki().args(["start", &self.id]))?;
        }
        follow(pid, signals, relay)
    }

    fn youki(&self) -> Command {
        let mut command = Command::new(&self.youki);
        command
            .arg("--root")
            .arg(&self.state)
            .args(["--log-level", "error"])
            .env_remove(PROCESS);
        command
    }
}

/// Run youki to its end; it explains its failures itself.
fn succeed(command: &mut Command) -> Result<(), String> {
    let status = command
        .status()
        .map_err(|error| format!("youki could not be started: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("youki failed: {status}"))
    }
}

/// Wait for the process, and meanwhile pass on signals and what is typed and printed.
fn follow(pid: Pid, signals: &SignalFd, mut relay: Option<Relay>) -> Result<u8, String> {
    loop {
        // A child may have ended before there was anybody to tell.
        if let Some(code) = reaped(pid)? {
            if let Some(relay) = &mut relay {
                relay.drain();
            }
            return Ok(code);
        }
        let mut waits = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(relay) = &relay {
            waits.extend(relay.waits());
        }
        match poll(&mut waits, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("poll: {error}")),
        }
        let ready: Vec<bool> = waits.iter().map(|wait| wait.any().unwrap_or(true)).collect();
        while let Ok(Some(found)) = signals.read_signal() {
            match i32::try_from(found.ssi_signo)
                .ok()
                .and_then(|number| Signal::try_from(number).ok())
            {
                Some(Signal::SIGCHLD) | None => {}
                Some(Signal::SIGWINCH) => {
                    if let Some(relay) = &relay {
                        relay.resize();
                    }
                }
                Some(signal) => {
                    let _ = kill(pid, signal); // it may have ended
                }
            }
        }
        if let Some(relay) = &mut relay {
            relay.carry(&ready[1..]);
        }
    }
}

/// Reap whatever ended; the exit code of `pid` when it was among that.
fn reaped(pid: Pid) -> Result<Option<u8>, String> {
    let mut found = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(who, code)) if who == pid => found = Some(u8::try_from(code & 0xff).unwrap_or(1)),
            Ok(WaitStatus::Signaled(who, signal, _)) if who == pid => {
                found = Some(128 + u8::try_from(signal as i32).unwrap_or(0));
            }
            Ok(WaitStatus::StillAlive) => return Ok(found),
            Ok(_) => {}
            Err(Errno::ECHILD) if found.is_some() => return Ok(found),
            Err(Errno::ECHILD) => return Err("the container's process went to another parent".into()),
            Err(error) => return Err(format!("waitpid: {error}")),
        }
    }
}
