//! `OciService`: containers in the guest, by way of youki.
//!
//! What is true of a container is youki's to know; the agent keeps its log, and remembers nothing.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tonic::{Request, Response, Status};

use crate::aside::aside;
use crate::collect::collect;
use crate::command;
use crate::idempotency::{to_the_end, while_wanted};
use crate::proto::oci_service_server::OciService;
use crate::proto::{
    OciCreateRequest, OciCreateResponse, OciDeleteRequest, OciDeleteResponse, OciExecRequest, OciExecResponse,
    OciKillRequest, OciKillResponse, OciStartRequest, OciStartResponse, OciStateRequest, OciStateResponse,
};
use crate::shim;
use crate::user::User;
use crate::youki::{WORDS, Youki, complaint, exists, global, missing, not_a_program};

/// A directory for each container's log, and for what a command in a container needs while it runs.
const OURS: &str = "/run/vz/oci";

/// Where the share is that the guest's root lies over.
const ROOT_SHARE: &str = "/vz-rootfs";

/// Bytes of each stream that `Exec` answers with.
const EXEC_BYTES: usize = 1 << 20;

/// The service.
pub struct Oci {
    runtime: Arc<Runtime>,
}

impl Oci {
    /// Runs containers by the program `runtime`, which takes youki's arguments, or by youki itself.
    #[must_use]
    pub fn new(runtime: Option<PathBuf>) -> Self {
        let runtime = Runtime {
            youki: Youki { asked: runtime },
            locks: Mutex::default(),
            execs: AtomicU64::new(0),
        };
        Self {
            runtime: Arc::new(runtime),
        }
    }
}

#[tonic::async_trait]
impl OciService for Oci {
    async fn create(&self, request: Request<OciCreateRequest>) -> Result<Response<OciCreateResponse>, Status> {
        let runtime = self.runtime.clone();
        let create = |request: OciCreateRequest| async move { runtime.create(&request).await };
        to_the_end("OciService.Create", request, create).await
    }

    async fn start(&self, request: Request<OciStartRequest>) -> Result<Response<OciStartResponse>, Status> {
        let runtime = self.runtime.clone();
        let start = |request: OciStartRequest| async move { runtime.start(&request.container_id).await };
        to_the_end("OciService.Start", request, start).await
    }

    async fn state(&self, request: Request<OciStateRequest>) -> Result<Response<OciStateResponse>, Status> {
        let runtime = self.runtime.clone();
        let state = |request: OciStateRequest| async move { runtime.state(&request.container_id).await };
        to_the_end("OciService.State", request, state).await
    }

    async fn exec(&self, request: Request<OciExecRequest>) -> Result<Response<OciExecResponse>, Status> {
        let runtime = self.runtime.clone();
        let exec = |request: OciExecRequest| async move { runtime.exec(&request).await };
        while_wanted("OciService.Exec", request, exec).await
    }

    async fn kill(&self, request: Request<OciKillRequest>) -> Result<Response<OciKillResponse>, Status> {
        let runtime = self.runtime.clone();
        let kill = |request: OciKillRequest| async move { runtime.kill(&request).await };
        to_the_end("OciService.Kill", request, kill).await
    }

    async fn delete(&self, request: Request<OciDeleteRequest>) -> Result<Response<OciDeleteResponse>, Status> {
        let runtime = self.runtime.clone();
        let delete = |request: OciDeleteRequest| async move { runtime.delete(&request).await };
        to_the_end("OciService.Delete", request, delete).await
    }
}

struct Runtime {
    youki: Youki,
    /// One for each container that is being worked on: youki does not guard against itself.
    locks: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    execs: AtomicU64,
}

impl Runtime {
    async fn create(&self, request: &OciCreateRequest) -> Result<OciCreateResponse, Status> {
        let id = checked(&request.container_id)?;
        let path = request.bundle_path.clone();
        let (bundle, _) = aside(move || bundle(&path)).await.map_err(|error| {
            Status::internal(format!("the bundle of container {id:?} cannot be looked at: {error}"))
        })?;
        let bundle = bundle?;
        let lock = self.lock(id);
        let _held = lock.lock().await;
        if exists(id) {
            return Err(Status::already_exists(format!("there is a container {id:?} already")));
        }
        let failed =
            |error: io::Error| Status::internal(format!("the log of container {id:?} cannot be made: {error}"));
        let directory = ours(id);
        // Also what an agent that was ended in the middle left.
        remove(&directory);
        std::fs::create_dir_all(&directory).map_err(failed)?;
        let words = directory.join("youki.log");
        let (log, container) = io::pipe().map_err(failed)?;
        let mut keeper = Command::from(shim::log(&directory.join("log")));
        // Not to be ended with the agent, nor by what ends the agent's group.
        // SAFETY: the function only makes system calls.
        unsafe { keeper.pre_exec(command::start_over) };
        keeper.stdin(log).process_group(0).spawn().map_err(failed)?;
        let mut command = self.youki.command("create", Some(&words)).await?;
        command
            .arg("--bundle")
            .arg(&bundle)
            .args(["--", id])
            .stdout(container.try_clone().map_err(failed)?)
            .stderr(container);
        let created = self.youki.run(command).await;
        // The command holds the log open, and is gone by now; the container holds it from here on.
        let said = std::fs::read_to_string(&words).unwrap_or_default();
        match created {
            Ok(collected) if collected.status.success() => Ok(OciCreateResponse {}),
            Ok(_) => {
                self.clean_up(id).await;
                Err(Status::internal(format!(
                    "youki could not create container {id:?}: {}",
                    complaint(&said)
                )))
            }
            Err(status) => {
                if exists(id) {
                    self.clean_up(id).await;
                }
                Err(status)
            }
        }
    }

    async fn start(&self, id: &str) -> Result<OciStartResponse, Status> {
        let id = checked(id)?;
        let lock = self.lock(id);
        let _held = lock.lock().await;
        self.wants(id, "Start", &["created"]).await?;
        let mut command = self.youki.command("start", None).await?;
        command.args(["--", id]);
        self.youki.succeed(command, "start", id).await?;
        Ok(OciStartResponse {})
    }

    async fn state(&self, id: &str) -> Result<OciStateResponse, Status> {
        let id = checked(id)?;
        let lock = self.lock(id);
        let _held = lock.lock().await;
        self.youki.state(id).await
    }

    async fn kill(&self, request: &OciKillRequest) -> Result<OciKillResponse, Status> {
        let id = checked(&request.container_id)?;
        let signal = signal(&request.signal)?;
        let lock = self.lock(id);
        let _held = lock.lock().await;
        let state = self.wants(id, "Kill", &["created", "running"]).await?;
        // Not by youki: it takes every signal for the end, so that a created container could not be started any more,
        // and it mistakes some numbers.
        // SAFETY: no memory is passed.
        let result = unsafe { nix::libc::kill(pid(&state).as_raw(), signal) };
        match nix::errno::Errno::result(result) {
            // It has just ended: that is no reason to complain.
            Ok(_) | Err(nix::errno::Errno::ESRCH) => Ok(OciKillResponse {}),
            Err(error) => Err(Status::internal(format!(
                "container {id:?} cannot be sent signal {:?}: {error}",
                request.signal
            ))),
        }
    }

    async fn delete(&self, request: &OciDeleteRequest) -> Result<OciDeleteResponse, Status> {
        let id = checked(&request.container_id)?;
        let lock = self.lock(id);
        let _held = lock.lock().await;
        if !request.force {
            self.wants(id, "Delete without force", &["created", "stopped"]).await?;
        } else if !exists(id) {
            remove(&ours(id));
            return Err(missing(id));
        }
        self.youki.delete(id, request.force).await?;
        remove(&ours(id));
        Ok(OciDeleteResponse {})
    }

    async fn exec(&self, request: &OciExecRequest) -> Result<OciExecResponse, Status> {
        let id = checked(&request.container_id)?;
        if request.command.is_empty() {
            return Err(Status::invalid_argument("Exec wants a command"));
        }
        if !request.working_dir.is_empty() && !request.working_dir.starts_with('/') {
            return Err(Status::invalid_argument(format!(
                "Exec wants an absolute path to work in, not {:?}",
                request.working_dir
            )));
        }
        if let Some(name) = request.env.keys().find(|name| name.is_empty() || name.contains('=')) {
            return Err(Status::invalid_argument(format!(
                "{name:?} cannot name an environment variable"
            )));
        }
        let state = {
            let lock = self.lock(id);
            let _held = lock.lock().await;
            self.wants(id, "Exec", &["running"]).await?
        };
        let number = self.execs.fetch_add(1, Ordering::Relaxed) + 1;
        let scratch = Scratch::new(number)
            .map_err(|error| Status::internal(format!("a command in container {id:?} cannot be prepared: {error}")))?;
        let (pid_file, words) = (scratch.0.join("pid"), scratch.0.join("youki.log"));

        let mut command = Command::from(shim::exec_command(&pid_file, &self.youki.program().await?));
        global(&mut command, Some(&words));
        command.args(["exec", "--detach", "--pid-file"]).arg(&pid_file);
        if !request.working_dir.is_empty() {
            command.args(["--cwd", &request.working_dir]);
        }
        if !request.user.is_empty() {
            let wanted = request.user.clone();
            let (user, _) = aside(move || container_user(&wanted, &state))
                .await
                .map_err(|error| self.youki.cannot_run(&error))?;
            let user = user?;
            command.args(["--user", &format!("{}:{}", user.uid, user.gid)]);
            for group in &user.groups {
                command.args(["--additional-gids", &group.to_string()]);
            }
            if !request.env.contains_key("HOME") {
                command.args(["--env", &format!("HOME={}", user.home)]);
            }
        }
        for (name, value) in &request.env {
            command.args(["--env", &format!("{name}={value}")]);
        }
        command.args(["--", id, &request.command]).args(&request.args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let (child, _thread) = aside(move || command.spawn().map(Ending))
            .await
            .map_err(|error| self.youki.cannot_run(&error))?;
        let mut child = child.map_err(|error| self.youki.cannot_run(&error))?;
        let collected = collect(&mut child.0, EXEC_BYTES)
            .await
            .map_err(|error| Status::internal(format!("the command's end could not be awaited: {error}")))?;
        if !pid_file.exists() {
            let said = std::fs::read_to_string(&words).unwrap_or_default() + &collected.stderr.text(WORDS);
            let sentence = format!(
                "youki could not start {:?} in container {id:?}: {}",
                request.command,
                complaint(&said)
            );
            return match not_a_program(&said) {
                Some(exit_code) => Ok(OciExecResponse {
                    exit_code,
                    stderr: sentence + "\n",
                    ..OciExecResponse::default()
                }),
                None => Err(Status::failed_precondition(sentence)),
            };
        }
        Ok(OciExecResponse {
            exit_code: collected.status.code().unwrap_or(-1),
            stdout: collected.stdout.text(EXEC_BYTES),
            stderr: collected.stderr.text(EXEC_BYTES),
        })
    }

    /// The lock of one container. Others' are forgotten here when nobody holds them any more.
    fn lock(&self, id: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(id).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        locks.insert(id.to_owned(), Arc::downgrade(&lock));
        lock
    }

    /// The state of a container that must be in one of `wanted` for `method`.
    async fn wants(&self, id: &str, method: &str, wanted: &[&str]) -> Result<OciStateResponse, Status> {
        let state = self.youki.state(id).await?;
        if wanted.contains(&state.status.as_str()) {
            return Ok(state);
        }
        Err(Status::failed_precondition(format!(
            "container {id:?} is {}; {method} wants one that is {}",
            state.status,
            wanted.join(" or ")
        )))
    }

    /// What failed half-way is nothing: neither youki nor the agent keeps anything of it.
    async fn clean_up(&self, id: &str) {
        let _ = self.youki.delete(id, true).await;
        remove(&ours(id));
    }
}

/// A shim whose command ends with it when nobody waits for it any more.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // The id is there as long as the child is not reaped, so it cannot be another process's yet.
        if let Some(pid) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
}

/// A directory for one command in a container, gone with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(number: u64) -> io::Result<Self> {
        // No container has a name with a space.
        let path = Path::new(OURS).join(format!("exec {} {number}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(directory: &Path) {
    let _ = std::fs::remove_dir_all(directory);
}

/// The agent's directory of a container, which has its log: `log`, and the part before that, `log.1`.
fn ours(id: &str) -> PathBuf {
    Path::new(OURS).join(id)
}

/// A name that youki takes, and that is one file name.
fn checked(id: &str) -> Result<&str, Status> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 255 || id == "." || id == ".." || !id.chars().all(plain) {
        return Err(Status::invalid_argument(format!(
            "{id:?} cannot name a container: 1 to 255 letters, digits and _+-. do"
        )));
    }
    Ok(id)
}

fn pid(state: &OciStateResponse) -> Pid {
    // 0 would be the agent's own process group.
    Pid::from_raw(i32::try_from(state.pid).ok().filter(|pid| *pid > 0).unwrap_or(i32::MAX))
}

/// The bundle's directory: where the request says, or there below the root share. What the host writes into the share
/// once the guest runs may not show in the overlay over it.
fn bundle(path: &str) -> Result<PathBuf, Status> {
    let Some(relative) = path.strip_prefix('/') else {
        return Err(Status::invalid_argument(format!(
            "Create wants the absolute path of a bundle, not {path:?}"
        )));
    };
    let places = [PathBuf::from(path), Path::new(ROOT_SHARE).join(relative)];
    let mut bundles = places.into_iter().filter(|place| place.join("config.json").is_file());
    bundles.next().ok_or_else(|| {
        Status::invalid_argument(format!(
            "{path:?} is no OCI bundle in the guest: it has no config.json, neither there nor below {ROOT_SHARE}"
        ))
    })
}

/// A signal's number: of its name, with or without `SIG`, or of the number itself; `RTMIN+3` and `RTMAX-1` too, signal(7).
fn signal(wanted: &str) -> Result<i32, Status> {
    let unknown = || Status::invalid_argument(format!("{wanted:?} is no signal"));
    if let Ok(number) = wanted.parse::<i32>() {
        return (1..=nix::libc::SIGRTMAX())
            .contains(&number)
            .then_some(number)
            .ok_or_else(unknown);
    }
    let name = wanted.to_ascii_uppercase();
    let name = if name.starts_with("SIG") {
        name
    } else {
        format!("SIG{name}")
    };
    let found = name.parse::<Signal>().map(|signal| signal as i32).ok();
    found.or_else(|| real_time(&name)).ok_or_else(unknown)
}

/// The number of `SIGRTMIN`, `SIGRTMIN+3`, `SIGRTMAX` or `SIGRTMAX-3`.
fn real_time(name: &str) -> Option<i32> {
    let (first, last) = (nix::libc::SIGRTMIN(), nix::libc::SIGRTMAX());
    let (start, sign, distance) = match name.strip_prefix("SIGRTMIN") {
        Some(rest) => (first, '+', rest),
        None => (last, '-', name.strip_prefix("SIGRTMAX")?),
    };
    let distance = match distance.strip_prefix(sign) {
        Some(digits) if digits.bytes().all(|digit| digit.is_ascii_digit()) => i32::from(digits.parse::<u8>().ok()?),
        None if distance.is_empty() => 0,
        _ => return None,
    };
    let number = if sign == '+' {
        start + distance
    } else {
        start - distance
    };
    (first..=last).contains(&number).then_some(number)
}

/// A user as the container's own /etc/passwd and /etc/group know it.
fn container_user(wanted: &str, state: &OciStateResponse) -> Result<User, Status> {
    let root = PathBuf::from(format!("/proc/{}/root", state.pid));
    let read = |path: &str| {
        inside(&root, path).map_err(|error| {
            Status::failed_precondition(format!(
                "/{path} of container {:?} cannot be read: {error}",
                state.container_id
            ))
        })
    };
    User::find_in(wanted, &read("etc/passwd")?, &read("etc/group")?).map_err(|problem| {
        Status::invalid_argument(problem.replace("in the guest", &format!("in container {:?}", state.container_id)))
    })
}

/// A file of the container's root, where its links lead; empty when it is not there.
fn inside(root: &Path, path: &str) -> io::Result<String> {
    use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
    use std::io::Read;

    let directory = std::fs::File::open(root)?;
    // The container wrote it: it must lead nowhere else, and must not make the agent wait.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(&directory, path, how) {
        Ok(file) => std::fs::File::from(file),
        Err(nix::errno::Errno::ENOENT) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(1 << 20).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_name_is_one_plain_file_name() {
        for id in ["c1", "web-1.2_a+b", "..."] {
            assert_eq!(checked(id).unwrap(), id);
        }
        for id in ["", ".", "..", "a/b", "../x", "a b", "ü", "a\0", &"x".repeat(256)] {
            assert_eq!(checked(id).unwrap_err().code(), tonic::Code::InvalidArgument, "{id:?}");
        }
    }

    #[test]
    fn a_signal_has_a_name_or_a_number() {
        for (wanted, number) in [
            ("SIGTERM", 15),
            ("kill", 9),
            ("5", 5),
            ("TRAP", 5),
            ("SIGBUS", 7),
            ("34", 34),
            ("SIGRTMIN", 34),
            ("rtmin+3", 37),
            ("SIGRTMAX-1", 63),
            ("RTMAX", 64),
        ] {
            assert_eq!(signal(wanted).unwrap(), number);
        }
        for wanted in [
            "",
            "0",
            "-9",
            "65",
            "SIG",
            "SIGNOTHING",
            "9 ",
            "RTMIN+31",
            "RTMIN-1",
            "RTMIN3",
            "RTMAX-31",
            "RTMIN++1",
        ] {
            assert!(signal(wanted).is_err(), "{wanted:?}");
        }
    }

    #[test]
    fn links_of_a_container_lead_nowhere_else() {
        let root = std::env::temp_dir().join(format!("vz-oci-root-{}", std::process::id()));
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(root.join("real"), "ours").unwrap();
        std::os::unix::fs::symlink("/real", root.join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", root.join("etc/group")).unwrap();
        assert_eq!(inside(&root, "etc/passwd").unwrap(), "ours");
        assert_eq!(inside(&root, "etc/group").unwrap(), "");
        nix::unistd::mkfifo(&root.join("etc/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(inside(&root, "etc/fifo").is_err());
        std::fs::remove_dir_all(&root).unwrap();
    }
}
