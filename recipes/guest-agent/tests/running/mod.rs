//! A running agent for the tests: the real binary on a Unix socket in a directory of its own, and a channel to it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Long enough for any machine: only a broken agent meets it.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A running agent; it and its directory end with this value.
pub struct Agent {
    pub process: Child,
    pub directory: PathBuf,
    pub channel: Channel,
}

impl Agent {
    /// Starts it with further arguments.
    #[allow(dead_code, reason = "not every test file starts it so")]
    pub async fn start(arguments: &[&str]) -> Self {
        Self::start_by(&[], arguments).await
    }

    /// Starts it by another program, whose words come before the agent's own.
    pub async fn start_by(before: &[&str], arguments: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("vz-agent-running-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let socket = directory.join("agent.sock");
        let words = [before, &[env!("CARGO_BIN_EXE_vz-guest-agent"), "--listen"]].concat();
        let process = Command::new(words[0])
            .args(&words[1..])
            .arg(format!("unix:{}", socket.display()))
            .args(arguments)
            .spawn()
            .unwrap();
        let channel = connect(&socket).await;
        Self {
            process,
            directory,
            channel,
        }
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
