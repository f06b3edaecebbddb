//! Idempotency keys: a second call with the key of an earlier one answers as that one did, and does nothing again.
//!
//! A key counts within one connection, since hosts number their requests anew on each, and there for one method and one
//! request: with another request it is another call. No call is refused for its key: one whose earlier answer is not
//! kept is made as if it were the first. What a connection keeps is bounded, and ends with it.

use std::collections::BTreeMap;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::feed::Feed;
use crate::proto;
use crate::proto::TransportMetadata;

/// Bytes that one connection keeps of answers, and of commands' events as many; the oldest go first.
pub const KEPT_BYTES: usize = 1 << 20;

/// Bytes that all connections together keep.
pub const KEPT_BYTES_IN_ALL: usize = 16 << 20;

/// What a call that is remembered costs beside its answer, about.
const ENTRY: usize = 256;

/// A request that may carry an idempotency key.
pub trait Keyed: Message {
    /// The request's metadata, empty when it has none.
    fn metadata(&mut self) -> &mut Option<TransportMetadata>;
}

macro_rules! keyed {
    ($($request:ident)*) => {
        $(impl Keyed for proto::$request {
            fn metadata(&mut self) -> &mut Option<TransportMetadata> {
                &mut self.metadata
            }
        })*
    };
}

keyed! {
    ExecRequest StdinWriteRequest StdinCloseRequest SignalRequest ResizeExecPtyRequest
    OciCreateRequest OciStartRequest OciStateRequest OciExecRequest OciKillRequest OciDeleteRequest
    NetworkSetupRequest NetworkTeardownRequest
}

/// What one connection has called with keys; tonic puts it into the extensions of each of its requests. A clone is
/// another handle.
#[derive(Clone, Default)]
pub struct Calls {
    answers: Keys<Arc<watch::Sender<Option<Answer>>>>,
    /// The commands that `Exec` has started.
    pub commands: Keys<Feed>,
}

/// An encoded response, or the status that the call failed with.
type Answer = Result<Vec<u8>, Status>;

impl Calls {
    /// Without a call yet. `all` counts what is kept beside this.
    #[must_use]
    pub fn new(all: &Kept) -> Self {
        Self {
            answers: Keys::new(all),
            commands: Keys::new(all),
        }
    }

    /// Those of the request's connection.
    #[must_use]
    pub fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or_default()
    }
}

/// What `call` answers to `request`, or what it answered when `method` was first called so with the request's key; a
/// first call that is still under way is waited for. It goes on to its end when the client goes away: half a
/// container is nobody's wish.
///
/// # Errors
/// The call's own status, also when repeated.
pub async fn to_the_end<Req, Res, Call>(
    method: &'static str,
    request: Request<Req>,
    call: impl FnOnce(Req) -> Call,
) -> Result<Response<Res>, Status>
where
    Req: Keyed,
    Res: Message + Default,
    Call: Future<Output = Result<Res, Status>> + Send + 'static,
{
    once(method, request, call, true).await
}

/// As [`to_the_end`], but the call is dropped, and forgotten, when nobody waits for its answer any more.
///
/// # Errors
/// As there.
pub async fn while_wanted<Req, Res, Call>(
    method: &'static str,
    request: Request<Req>,
    call: impl FnOnce(Req) -> Call,
) -> Result<Response<Res>, Status>
where
    Req: Keyed,
    Res: Message + Default,
    Call: Future<Output = Result<Res, Status>> + Send + 'static,
{
    once(method, request, call, false).await
}

async fn once<Req, Res, Call>(
    method: &'static str,
    request: Request<Req>,
    call: impl FnOnce(Req) -> Call,
    outlives: bool,
) -> Result<Response<Res>, Status>
where
    Req: Keyed,
    Res: Message + Default,
    Call: Future<Output = Result<Res, Status>> + Send + 'static,
{
    let answers = Calls::of(&request).answers;
    let mut request = request.into_inner();
    let id = identity(method, &mut request);
    let mut answer = if let Some(first) = id.and_then(|id| answers.find(id)) {
        first.subscribe()
    } else {
        let (sender, receiver) = watch::channel(None);
        let sender = Arc::new(sender);
        let mut ticket = id.and_then(|id| answers.remember(id, sender.clone()));
        let work = call(request);
        tokio::spawn(async move {
            tokio::select! {
                answer = work => {
                    let answer = answer.map(|response| response.encode_to_vec());
                    if let Some(ticket) = &mut ticket {
                        ticket.grow(answer.as_ref().map_or_else(|status| status.message().len(), Vec::len));
                    }
                    sender.send_replace(Some(answer));
                }
                // Nobody comes in between: the agent has one thread.
                () = sender.closed(), if !outlives => if let Some(ticket) = &mut ticket {
                    ticket.forget();
                },
            }
        });
        receiver
    };
    let lost = || Status::internal(format!("{method} ended without an answer"));
    let answer = answer.wait_for(Option::is_some).await.map_err(|_| lost())?;
    let encoded = answer.as_ref().ok_or_else(lost)?.as_ref().map_err(Status::clone)?;
    Ok(Response::new(Res::decode(encoded.as_slice()).map_err(|_| lost())?))
}

/// Equal for the same request to the same method with the same key; `None` when it has no key. As the same build of the
/// agent encodes requests they are equal when they mean the same: their maps are sorted.
pub fn identity(method: &'static str, request: &mut impl Keyed) -> Option<u64> {
    // Another try of the same request may have another request_id.
    let metadata = request.metadata().take();
    let key = metadata.as_ref().map_or("", |metadata| &metadata.idempotency_key);
    let identity = (!key.is_empty()).then(|| {
        let mut hasher = DefaultHasher::new();
        (method, key, request.encode_to_vec()).hash(&mut hasher);
        hasher.finish()
    });
    *request.metadata() = metadata;
    identity
}

/// How many bytes all connections of an agent keep. A clone is another handle.
#[derive(Clone, Default)]
pub struct Kept(Arc<AtomicUsize>);

/// Calls of one connection, each with what answers it again. A clone is another handle.
pub struct Keys<T>(Arc<Mutex<State<T>>>);

struct State<T> {
    /// In the order of their start.
    calls: BTreeMap<u64, Call<T>>,
    last: u64,
    bytes: usize,
    all: Kept,
}

struct Call<T> {
    identity: u64,
    answer: T,
    bytes: usize,
    ended: bool,
}

impl<T> Clone for Keys<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Keys<T> {
    fn default() -> Self {
        Self::new(&Kept::default())
    }
}

impl<T> Keys<T> {
    fn new(all: &Kept) -> Self {
        Self(Arc::new(Mutex::new(State {
            calls: BTreeMap::new(),
            last: 0,
            bytes: 0,
            all: all.clone(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What answers the call again that came with this [`identity`] before.
    #[must_use]
    pub fn find(&self, identity: u64) -> Option<T>
    where
        T: Clone,
    {
        let state = self.lock();
        let call = state.calls.values().rev().find(|call| call.identity == identity);
        call.map(|call| call.answer.clone())
    }

    /// Remembers a call that starts, and what will answer it again; `None` when there is no room for it.
    #[must_use]
    pub fn remember(&self, identity: u64, answer: T) -> Option<Ticket<T>> {
        let mut state = self.lock();
        if !state.take(ENTRY) {
            return None;
        }
        state.last += 1;
        let number = state.last;
        let call = Call {
            identity,
            answer,
            bytes: ENTRY,
            ended: false,
        };
        state.calls.insert(number, call);
        Some(Ticket {
            keys: self.clone(),
            number,
        })
    }
}

impl<T> State<T> {
    /// Takes `wanted` more bytes, for which ended calls are forgotten, the oldest first, as far as needed.
    fn take(&mut self, wanted: usize) -> bool {
        if wanted > KEPT_BYTES {
            return false;
        }
        while self.bytes + wanted > KEPT_BYTES || self.all.0.load(Ordering::Relaxed) + wanted > KEPT_BYTES_IN_ALL {
            let oldest = self.calls.iter().find(|(_, call)| call.ended);
            let Some(number) = oldest.map(|(number, _)| *number) else {
                return false;
            };
            self.forget(number);
        }
        self.bytes += wanted;
        self.all.0.fetch_add(wanted, Ordering::Relaxed);
        true
    }

    fn forget(&mut self, number: u64) {
        if let Some(call) = self.calls.remove(&number) {
            self.bytes -= call.bytes;
            self.all.0.fetch_sub(call.bytes, Ordering::Relaxed);
        }
    }
}

impl<T> Drop for State<T> {
    fn drop(&mut self) {
        self.all.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A call under way that is remembered. Dropping it says that the call has ended.
pub struct Ticket<T> {
    keys: Keys<T>,
    number: u64,
}

impl<T> Ticket<T> {
    /// Accounts for `bytes` more of the answer. When they do not fit the call is forgotten, and this is false.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let mut state = self.keys.lock();
        // Not by what this call has already: it is all or nothing.
        let fits = state.calls.contains_key(&self.number) && state.take(bytes);
        match state.calls.get_mut(&self.number) {
            Some(call) if fits => call.bytes += bytes,
            _ => state.forget(self.number),
        }
        fits
    }

    /// Forgets the call: it is not answered again.
    pub fn forget(&mut self) {
        self.keys.lock().forget(self.number);
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        if let Some(call) = self.keys.lock().calls.get_mut(&self.number) {
            call.ended = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::proto::{OciExecRequest, OciExecResponse};

    /// A connection whose calls are counted, and answer with their number and `size` bytes.
    #[derive(Default)]
    struct Connection {
        calls: Calls,
        count: Arc<AtomicUsize>,
    }

    impl Connection {
        fn request(&self, key: &str, command: &str) -> Request<OciExecRequest> {
            let mut request = Request::new(OciExecRequest {
                command: command.into(),
                env: (0..20).map(|n| (format!("V{n}"), n.to_string())).collect(),
                metadata: Some(TransportMetadata {
                    request_id: String::new(),
                    idempotency_key: key.into(),
                }),
                ..OciExecRequest::default()
            });
            request.extensions_mut().insert(self.calls.clone());
            request
        }

        async fn call_with(&self, method: &'static str, request: Request<OciExecRequest>, size: usize) -> i32 {
            let count = self.count.clone();
            let answer = to_the_end(method, request, |_| async move {
                let number = count.fetch_add(1, Ordering::Relaxed) + 1;
                tokio::task::yield_now().await;
                Ok(OciExecResponse {
                    exit_code: i32::try_from(number).unwrap(),
                    stdout: "x".repeat(size),
                    ..OciExecResponse::default()
                })
            });
            answer.await.unwrap().into_inner().exit_code
        }

        async fn call(&self, method: &'static str, key: &str, command: &str) -> i32 {
            self.call_with(method, self.request(key, command), 0).await
        }

        async fn call_of(&self, key: &str, size: usize) -> i32 {
            self.call_with("A", self.request(key, "one"), size).await
        }

        fn bytes(&self) -> usize {
            self.calls.answers.lock().bytes
        }
    }

    #[tokio::test]
    async fn a_key_answers_again_and_without_one_every_call_counts() {
        let connection = Connection::default();
        assert_eq!(connection.call("A", "k", "one").await, 1);
        let mut again = connection.request("k", "one");
        again.get_mut().metadata.as_mut().unwrap().request_id = "another try".into();
        assert_eq!(connection.call_with("A", again, 0).await, 1);
        assert_eq!(connection.call("B", "k", "one").await, 2);
        assert_eq!(connection.call("A", "", "one").await, 3);
        assert_eq!(connection.call("A", "", "one").await, 4);
    }

    #[tokio::test]
    async fn a_key_belongs_to_its_request_and_its_connection() {
        let connection = Connection::default();
        assert_eq!(connection.call("A", "k", "one").await, 1);
        assert_eq!(connection.call("A", "k", "two").await, 2);
        assert_eq!(connection.call("A", "k", "one").await, 1);
        assert_eq!(connection.call("A", &"k".repeat(1 << 20), "one").await, 3);
        let other = Connection {
            calls: Calls::default(),
            count: connection.count.clone(),
        };
        assert_eq!(other.call("A", "k", "one").await, 4);
    }

    #[tokio::test]
    async fn a_failure_is_an_answer_too() {
        let connection = Connection::default();
        for text in ["first", "second"] {
            let fail = |_| async move { Err::<OciExecResponse, _>(Status::not_found(text)) };
            let answer = to_the_end("A", connection.request("k", "one"), fail).await;
            let status = answer.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::NotFound, "first"));
        }
    }

    #[tokio::test]
    async fn a_second_call_waits_for_the_first_even_when_its_client_is_gone() {
        let connection = Connection::default();
        let (open, gate) = tokio::sync::oneshot::channel::<()>();
        let wait = |_| async move {
            gate.await.unwrap();
            Ok(OciExecResponse {
                exit_code: 7,
                ..OciExecResponse::default()
            })
        };
        let first = tokio::spawn(to_the_end("A", connection.request("k", "one"), wait));
        tokio::task::yield_now().await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let never = |_| async { panic!("the work is done twice") };
        let second = to_the_end::<_, OciExecResponse, _>("A", connection.request("k", "one"), never);
        open.send(()).unwrap();
        assert_eq!(second.await.unwrap().into_inner().exit_code, 7);
    }

    #[tokio::test]
    async fn a_call_that_only_its_clients_want_ends_with_the_last_of_them() {
        let connection = Connection::default();
        let (held, mut ended) = tokio::sync::oneshot::channel::<()>();
        let wait = |_| async move {
            let _held = held;
            std::future::pending::<Result<OciExecResponse, Status>>().await
        };
        let first = tokio::spawn(while_wanted("A", connection.request("k", "one"), wait));
        tokio::task::yield_now().await;
        let never = |_| async { panic!("the work is done twice") };
        let second = while_wanted::<_, OciExecResponse, _>("A", connection.request("k", "one"), never);
        let second = tokio::spawn(second);
        tokio::task::yield_now().await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        tokio::task::yield_now().await;
        assert!(ended.try_recv() == Err(tokio::sync::oneshot::error::TryRecvError::Empty));
        second.abort();
        assert!((&mut ended).await.is_err());
        // It is as if it had never been.
        assert_eq!(connection.call("A", "k", "one").await, 1);
        assert_eq!(connection.calls.answers.lock().calls.len(), 1);
    }

    #[tokio::test]
    async fn answers_are_bounded_and_one_that_is_not_kept_is_made_anew() {
        let connection = Connection::default();
        for number in 1..=10 {
            assert_eq!(
                connection.call_of(&format!("key {number}"), KEPT_BYTES / 4).await,
                number
            );
            assert!(connection.bytes() <= KEPT_BYTES);
        }
        assert_eq!(connection.call_of("key 10", KEPT_BYTES / 4).await, 10);
        assert_eq!(connection.call_of("key 1", KEPT_BYTES / 4).await, 11);
        // One that never fits is answered all the same, and takes nobody's place.
        assert_eq!(connection.call_of("huge", KEPT_BYTES).await, 12);
        assert_eq!(connection.call_of("huge", KEPT_BYTES).await, 13);
        assert_eq!(connection.call_of("key 10", KEPT_BYTES / 4).await, 10);
        for number in 0..2 * KEPT_BYTES / ENTRY {
            connection.call_of(&format!("small {number}"), 0).await;
        }
        assert!(connection.calls.answers.lock().calls.len() <= KEPT_BYTES / ENTRY);
    }

    #[tokio::test]
    async fn all_connections_together_are_bounded_and_each_ends_with_what_it_kept() {
        let all = Kept::default();
        let kept = || all.0.load(Ordering::Relaxed);
        let connections: Vec<Connection> = (0..40)
            .map(|_| Connection {
                calls: Calls::new(&all),
                count: Arc::default(),
            })
            .collect();
        for connection in &connections {
            assert_eq!(connection.call_of("k", KEPT_BYTES / 2).await, 1);
            assert!(kept() <= KEPT_BYTES_IN_ALL);
        }
        assert_eq!(connections[0].call_of("k", KEPT_BYTES / 2).await, 1);
        // Nothing was left for the last one, and it was served.
        assert_eq!(connections[39].call_of("k", KEPT_BYTES / 2).await, 2);
        drop(connections);
        assert_eq!(kept(), 0);
    }

    #[tokio::test]
    async fn calls_under_way_are_bounded_too() {
        let keys = Keys::<()>::default();
        let tickets: Vec<_> = (0..).map_while(|number| keys.remember(number, ())).collect();
        assert_eq!(tickets.len(), KEPT_BYTES / ENTRY);
        drop(tickets);
        assert!(keys.remember(0, ()).is_some());
    }
}
