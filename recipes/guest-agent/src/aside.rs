//! Runs what may wait for ever, such as a program on a share that its host serves no more, beside the agent's one thread.

use std::io;
use std::sync::mpsc;
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Bytes of such a thread's stack.
const STACK: usize = 256 * 1024;

/// A thread that stays for as long as this value: with it the kernel would end the child that it started, where that
/// asked for it (`PR_SET_PDEATHSIG`).
pub struct Thread {
    _end: mpsc::Sender<()>,
}

/// What `work` gives, done on a thread of its own, in this runtime. When nobody waits any more, it is dropped there.
///
/// # Errors
/// When there is no thread to be had.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<(T, Thread)> {
    let runtime = Handle::current();
    let (give, made) = oneshot::channel();
    let (sender, end) = mpsc::channel();
    thread::Builder::new().stack_size(STACK).spawn(move || {
        let _inside = runtime.enter();
        if give.send(work()).is_ok() {
            let _ = end.recv();
        }
    })?;
    let made = made.await.map_err(|_| io::Error::other("the thread has ended"))?;
    Ok((made, Thread { _end: sender }))
}
