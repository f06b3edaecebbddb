//! Runs youki, and reads what it says.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;
use tokio::time::{sleep, timeout};
use tonic::Status;

use crate::aside::aside;
use crate::collect::{Collected, collect};
use crate::command;
use crate::proto::OciStateResponse;

/// Where youki is when the agent is not told otherwise: on the host's share `oci-runtime-bin`, or in the guest's root.
const PROGRAMS: [&str; 2] = ["/run/vz-oci/bin/youki", "/usr/local/bin/youki"];

/// youki's own record of its containers; its default, so that a person sees them as well.
const STATE: &str = "/run/youki";

/// Bytes of youki's own words that are read.
pub const WORDS: usize = 64 * 1024;

/// How long youki may take for anything but a command; hooks count.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a container's killed processes may take to be gone.
const DYING: Duration = Duration::from_secs(10);

/// How often the state is asked for.
const TRIES: u32 = 3;

/// How long to wait for them before youki is asked again.
const AGAIN: Duration = Duration::from_millis(100);

/// The program.
pub struct Youki {
    /// Its path, when it is not to be looked for.
    pub asked: Option<PathBuf>,
}

impl Youki {
    /// The program's path.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` when it is not there, `DEADLINE_EXCEEDED` when its share's host does not tell.
    pub async fn program(&self) -> Result<PathBuf, Status> {
        let asked = self.asked.clone();
        let found = aside(move || {
            let there = || PROGRAMS.map(PathBuf::from).into_iter().find(|program| program.exists());
            let program = asked.or_else(there).unwrap_or(PROGRAMS[0].into());
            program.metadata().map(|_| program)
        });
        let (found, _) = timeout(LIMIT, found)
            .await
            .map_err(|_| late())?
            .map_err(|error| self.cannot_run(&error))?;
        found.map_err(|error| self.cannot_run(&error))
    }

    /// What youki knows of a container, in the contract's words.
    ///
    /// # Errors
    /// `NOT_FOUND`, or what keeps youki from telling.
    pub async fn state(&self, id: &str) -> Result<OciStateResponse, Status> {
        if !exists(id) {
            return Err(missing(id));
        }
        let mut tries = 0;
        let collected = loop {
            let mut command = self.command("state", None).await?;
            command.args(["--", id]);
            let collected = self.run(command).await?;
            tries += 1;
            // In emulated guests on busy hosts youki was seen to end by a memory fault, about once in a thousand times.
            // Asking again changes nothing.
            if collected.status.signal().is_none() || tries == TRIES {
                break collected;
            }
        };
        let said = succeeded(collected, "tell the state of", id)?.stdout.text(WORDS);
        let unreadable = |_| Status::internal(format!("youki's state of container {id:?} is not readable: {said:?}"));
        let state: serde_json::Value = serde_json::from_str(&said).map_err(unreadable)?;
        let status = match state["status"].as_str().unwrap_or_default() {
            // The contract has three words.
            "creating" => "created",
            "paused" => "running",
            other => other,
        };
        let pid = state["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        Ok(OciStateResponse {
            container_id: id.to_owned(),
            status: status.to_owned(),
            // youki still names the process that was.
            pid: if status == "stopped" { 0 } else { pid.unwrap_or(0) },
            bundle_path: state["bundle"].as_str().unwrap_or_default().to_owned(),
        })
    }

    /// The command `verb`, to which its own words may follow; youki's complaints go to the file `words`, when there
    /// is one, else to standard error.
    ///
    /// # Errors
    /// As [`Youki::program`].
    pub async fn command(&self, verb: &str, words: Option<&Path>) -> Result<Command, Status> {
        let mut command = Command::new(self.program().await?);
        global(&mut command, words);
        command.arg(verb).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    /// Deletes a container, one that runs only by `force`. Its processes are given [`DYING`] to be gone.
    ///
    /// # Errors
    /// As [`Youki::succeed`].
    pub async fn delete(&self, id: &str, force: bool) -> Result<(), Status> {
        let end = Instant::now() + DYING;
        loop {
            let mut command = self.command("delete", None).await?;
            if force {
                command.arg("--force");
            }
            command.args(["--", id]);
            let Err(status) = self.succeed(command, "delete", id).await else {
                return Ok(());
            };
            // youki waits a tenth of a second for what it has killed to leave the cgroup, and on a busy machine a
            // process takes longer to die. The container is as it was then: its cgroup is the first that youki removes.
            if Instant::now() >= end || !status.message().contains("failed to remove cgroup") {
                return Err(status);
            }
            sleep(AGAIN).await;
        }
    }

    /// Runs a command that must succeed.
    ///
    /// # Errors
    /// `INTERNAL` with youki's own words when it fails, and those of [`Youki::run`].
    pub async fn succeed(&self, command: Command, what: &str, id: &str) -> Result<Collected, Status> {
        succeeded(self.run(command).await?, what, id)
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` when youki cannot be run, `DEADLINE_EXCEEDED` when it does not end.
    pub async fn run(&self, mut command: Command) -> Result<Collected, Status> {
        command.stdin(Stdio::null()).kill_on_drop(true);
        let collected = async {
            // The command is dropped there: it holds the ends of pipes that the container is to hold alone.
            let (child, _thread) = aside(move || command.spawn()).await?;
            collect(&mut child?, WORDS).await
        };
        match timeout(LIMIT, collected).await {
            Ok(collected) => collected.map_err(|error| self.cannot_run(&error)),
            Err(_) => Err(late()),
        }
    }

    /// The answer to a call when the program cannot be run.
    #[must_use]
    pub fn cannot_run(&self, error: &io::Error) -> Status {
        let program = self.asked.as_deref().unwrap_or(Path::new(PROGRAMS[0])).display();
        let share = if self.asked.is_none() {
            "; the host has to share youki's directory by virtiofs under the tag oci-runtime-bin"
        } else {
            ""
        };
        Status::failed_precondition(format!(
            "the OCI runtime {program} cannot be run in the guest: {error}{share}"
        ))
    }
}

/// What a command that must succeed came to.
fn succeeded(collected: Collected, what: &str, id: &str) -> Result<Collected, Status> {
    if collected.status.success() {
        return Ok(collected);
    }
    let why = match collected.status.signal() {
        Some(signal) => format!("signal {signal} ended it"),
        None => complaint(&collected.stderr.text(WORDS)),
    };
    Err(Status::internal(format!(
        "youki could not {what} container {id:?}: {why}"
    )))
}

fn late() -> Status {
    Status::deadline_exceeded(format!(
        "youki did not end within {} s, and was killed",
        LIMIT.as_secs()
    ))
}

/// Whether youki has a container of that name.
#[must_use]
pub fn exists(id: &str) -> bool {
    Path::new(STATE).join(id).exists()
}

/// The answer to a call that wants a container that is not there.
#[must_use]
pub fn missing(id: &str) -> Status {
    Status::not_found(format!("there is no container {id:?}"))
}

/// The arguments of youki that come before the verb.
pub fn global(youki: &mut Command, words: Option<&Path>) {
    youki.args(["--root", STATE]);
    if let Some(words) = words {
        youki.arg("--log").arg(words);
    }
    // Nothing of the agent's, which would go on into hooks.
    youki.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    // SAFETY: the function only makes system calls.
    unsafe { youki.pre_exec(command::start_over) };
}

/// One sentence out of what youki printed: its last word, and the first cause that it logged.
pub fn complaint(said: &str) -> String {
    let lines: Vec<String> = said.lines().map(plain).collect();
    let last = |prefix: &str| {
        lines
            .iter()
            .rposition(|line| line.starts_with(prefix))
            .map(|at| (at, prefix.len()))
    };
    let end = last("ERROR youki: error in executing command: ").or_else(|| last("Error: "));
    let mut parts: Vec<String> = Vec::new();
    if let Some((at, skipped)) = end {
        parts.push(lines[at][skipped..].to_owned());
        let causes = lines[at + 1..].iter().map(|line| line.trim());
        for cause in causes.take_while(|line| !line.starts_with("Error: ")) {
            let cause = cause
                .split_once(": ")
                .filter(|(number, _)| number.parse::<u8>().is_ok())
                .map_or(cause, |c| c.1);
            if !cause.is_empty() && cause != "Caused by:" {
                parts.push(cause.to_owned());
            }
        }
    }
    let logged = lines.iter().find_map(|line| line.strip_prefix("ERROR libcontainer::"));
    if let Some((_, cause)) = logged.and_then(|line| line.split_once(": ")) {
        parts.push(cause.to_owned());
    }
    parts.dedup();
    if parts.is_empty() {
        parts.extend(lines.iter().rfind(|line| !line.is_empty()).map(ToString::to_string));
    }
    if parts.is_empty() {
        return "it does not say why".to_owned();
    }
    parts.join(": ")
}

/// The exit code of a shell whose command is no program, when that is why youki did not start one: 127 for one that is
/// not there, 126 for one that cannot be executed.
#[must_use]
pub fn not_a_program(said: &str) -> Option<i32> {
    // What youki's check of the command says, and what the kernel said.
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if has(&["not found in $PATH", "error 'ENOENT"]) {
        Some(127)
    } else if has(&[
        "does not have correct permissions",
        "failed to check permissions for executable",
        "error 'EACCES",
        "error 'ENOEXEC",
    ]) {
        Some(126)
    } else {
        None
    }
}

/// A line without what a log file has more than a terminal: colours, and the time before the level.
fn plain(line: &str) -> String {
    let mut parts = line.split('\x1b');
    let mut text = parts.next().unwrap_or_default().to_owned();
    // Each is `[…m` and text.
    text.extend(parts.map(|part| part.split_once('m').map_or("", |(_, text)| text)));
    let start = text.find("ERROR ").filter(|at| text[..*at].ends_with("Z "));
    text[start.unwrap_or(0)..].trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn youkis_words_become_a_sentence() {
        assert_eq!(
            complaint(
                "ERROR youki: error in executing command: container x does not exist.\nError: container x does not exist.\n"
            ),
            "container x does not exist."
        );
        assert_eq!(
            complaint(
                "ERROR libcontainer::syscall::linux: failed to pivot root\nERROR libcontainer::process: later\n\
                 Error: failed to create container: exec failed\n\nCaused by:\n    0: two\n    1: three\n"
            ),
            "failed to create container: exec failed: two: three: failed to pivot root"
        );
        let colours = "\x1b[2m2026-11-24T17:57:59.630840Z\x1b[0m \x1b[31mERROR\x1b[0m \x1b[2myouki\x1b[0m\x1b[2m:\x1b[0m \
                       error in executing command: no ERROR here\n";
        assert_eq!(complaint(colours), "no ERROR here");
        assert_eq!(complaint(""), "it does not say why");
        assert_eq!(complaint("Segmentation fault\n"), "Segmentation fault");
    }
}
