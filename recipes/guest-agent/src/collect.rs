//! Waits for a child process and collects what it prints, up to a limit.

use std::io;
use std::os::fd::AsFd;
use std::process::ExitStatus;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Child;

/// Bytes read at once.
const CHUNK: usize = 16 * 1024;

/// How a process ended, and what it said.
pub struct Collected {
    /// Its end.
    pub status: ExitStatus,
    /// The start of its standard output, when that is a pipe.
    pub stdout: Printed,
    /// The start of its standard error, when that is a pipe.
    pub stderr: Printed,
}

/// The start of what was printed, and how many bytes followed that were dropped.
#[derive(Default)]
pub struct Printed {
    bytes: Vec<u8>,
    dropped: u64,
}

impl Printed {
    /// As text, at most `limit` bytes of it; when something is missing, the last line says how much.
    #[must_use]
    pub fn text(&self, limit: usize) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        // What is no UTF-8 is three times as long now.
        let end = (0..=limit.min(text.len()))
            .rev()
            .find(|end| text.is_char_boundary(*end))
            .unwrap_or(0);
        let dropped = self.dropped + (text.len() - end) as u64;
        if dropped == 0 {
            return text.into_owned();
        }
        format!(
            "{}\n[vz-guest-agent: {dropped} more bytes were dropped]\n",
            &text[..end]
        )
    }

    fn take(&mut self, chunk: &[u8], limit: usize) {
        let kept = chunk.len().min(limit - self.bytes.len());
        self.bytes.extend_from_slice(&chunk[..kept]);
        self.dropped += (chunk.len() - kept) as u64;
    }
}

/// Waits for the end of `child`, taking what it prints all the while: the first `limit` bytes of each stream are kept.
///
/// What it leaves running in the background is not waited for, even if it holds the pipes.
///
/// # Errors
/// When the end cannot be awaited.
pub async fn collect(child: &mut Child, limit: usize) -> io::Result<Collected> {
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let (mut stdout, mut stderr) = (Printed::default(), Printed::default());
    let status = {
        let reading = async {
            tokio::join!(
                read_all(&mut out, &mut stdout, limit),
                read_all(&mut err, &mut stderr, limit)
            );
            std::future::pending::<()>().await;
        };
        tokio::select! {
            status = child.wait() => status?,
            () = reading => unreachable!("it never ends"),
        }
    };
    if let Some(pipe) = out {
        left_over(&pipe, &mut stdout, limit);
    }
    if let Some(pipe) = err {
        left_over(&pipe, &mut stderr, limit);
    }
    Ok(Collected { status, stdout, stderr })
}

async fn read_all(pipe: &mut Option<impl AsyncRead + Unpin>, printed: &mut Printed, limit: usize) {
    let Some(pipe) = pipe else { return };
    let mut chunk = vec![0; CHUNK];
    while let Ok(length @ 1..) = pipe.read(&mut chunk).await {
        printed.take(&chunk[..length], limit);
    }
}

/// What an ended process left in its pipe, at most what a pipe holds: somebody else may go on writing.
fn left_over(pipe: &impl AsFd, printed: &mut Printed, limit: usize) {
    let mut chunk = vec![0; CHUNK];
    for _ in 0..(1 << 20) / CHUNK {
        // The descriptor does not block; no data is an error like any other.
        let Ok(length @ 1..) = nix::unistd::read(pipe, &mut chunk) else {
            return;
        };
        printed.take(&chunk[..length], limit);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    async fn shell(script: &str, limit: usize) -> Collected {
        let mut command = tokio::process::Command::new("sh");
        command
            .args(["-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        collect(&mut command.spawn().unwrap(), limit).await.unwrap()
    }

    #[tokio::test]
    async fn both_streams_and_the_end() {
        let collected = shell("echo out; echo err >&2; exit 3", 100).await;
        assert_eq!(collected.stdout.text(100), "out\n");
        assert_eq!(collected.stderr.text(100), "err\n");
        assert_eq!(collected.status.code(), Some(3));
    }

    #[tokio::test]
    async fn what_is_too_much_is_counted_and_the_process_ends_all_the_same() {
        let collected = shell("head -c 3000000 /dev/zero; exit 4", 1000).await;
        let text = collected.stdout.text(1000);
        assert!(
            text.ends_with("\n[vz-guest-agent: 2999000 more bytes were dropped]\n"),
            "{text}"
        );
        assert_eq!(collected.status.code(), Some(4));
    }

    #[tokio::test]
    async fn what_stays_in_the_background_is_not_waited_for() {
        let collected = shell("sleep 1000 & echo $!", 100).await;
        let pid = collected.stdout.text(100).trim().parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    #[test]
    fn text_that_grows_is_cut_at_a_character() {
        let printed = Printed {
            bytes: vec![0xff; 10],
            dropped: 0,
        };
        assert_eq!(printed.text(30), "\u{fffd}".repeat(10));
        assert_eq!(
            printed.text(10),
            format!(
                "{}\n[vz-guest-agent: 21 more bytes were dropped]\n",
                "\u{fffd}".repeat(3)
            )
        );
    }
}
