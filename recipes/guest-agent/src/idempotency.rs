//! Idempotency keys: a second call with the key of an earlier one answers as that one did, and does nothing again.
//!
//! A key counts per method. What is remembered is bounded in number, bytes and time, by the constants below; an
//! answer that is no longer kept, or was too large to be, leaves its key behind, so that a late second call is told
//! in a sentence and the work is still not done twice. Nothing is remembered across a restart of the agent.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Response, Status};

use crate::proto;
use crate::proto::TransportMetadata;

/// Calls remembered after their end; the oldest is forgotten first. Those under way are remembered in any case.
pub const KEPT_CALLS: usize = 4096;

/// How long a call is remembered after its end.
pub const KEPT_FOR: Duration = Duration::from_secs(600);

/// Bytes of answers kept in all; the oldest answer is dropped first, and its key stays.
pub const KEPT_BYTES: usize = 8 << 20;

/// Longest key taken, in bytes.
const LONGEST_KEY: usize = 1024;

/// A request that may carry an idempotency key.
pub trait Keyed: Message + Clone {
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

/// The answers of unary calls, by key. A clone is another handle on the same answers.
#[derive(Clone, Default)]
pub struct Answers(Keys<watch::Receiver<Option<Answer>>>);

/// An encoded response, or the status that the call failed with.
type Answer = Result<Vec<u8>, Status>;

impl Answers {
    /// What `call` answers to `request`, or what it answered when `method` was first called with the request's key;
    /// a first call that is still under way is waited for.
    ///
    /// With a key the call goes on to its end when the client goes away. Without one it is dropped then.
    ///
    /// # Errors
    /// The call's own status, also when repeated; `INVALID_ARGUMENT` when the key came with another request before;
    /// `ALREADY_EXISTS` when the first call's answer is no longer kept.
    pub async fn once<Req, Res, Call>(
        &self,
        method: &'static str,
        mut request: Req,
        call: impl FnOnce(Req) -> Call,
    ) -> Result<Response<Res>, Status>
    where
        Req: Keyed,
        Res: Message + Default,
        Call: Future<Output = Result<Res, Status>> + Send + 'static,
    {
        let (sender, receiver) = watch::channel(None);
        let mut answer = match self.0.claim(method, &mut request, || receiver.clone())? {
            Claim::Unkeyed => return call(request).await.map(Response::new),
            Claim::Again(first) => first,
            Claim::First(mut ticket) => {
                let work = call(request);
                tokio::spawn(async move {
                    let answer = work.await.map(|response| response.encode_to_vec());
                    ticket.grow(answer.as_ref().map_or_else(|status| status.message().len(), Vec::len));
                    sender.send_replace(Some(answer));
                });
                receiver
            }
        };
        let lost = || Status::internal(format!("{method} ended without an answer"));
        let answer = answer.wait_for(Option::is_some).await.map_err(|_| lost())?;
        let encoded = answer.as_ref().ok_or_else(lost)?.as_ref().map_err(Status::clone)?;
        Ok(Response::new(Res::decode(encoded.as_slice()).map_err(|_| lost())?))
    }
}

/// Calls under way and ended ones by their keys, each with what answers it again. A clone is another handle.
pub struct Keys<T>(Arc<Mutex<State<T>>>);

/// What a request's key says.
pub enum Claim<T> {
    /// It has none.
    Unkeyed,
    /// It is new; to be held until the call has ended.
    First(Ticket<T>),
    /// The same request came before, and this answers it again.
    Again(T),
}

type Key = (&'static str, String);

struct State<T> {
    calls: HashMap<Key, Call<T>>,
    /// Ended calls, the oldest first.
    ended: VecDeque<(Instant, Key)>,
    /// Ended calls at the front of `ended` whose answers are dropped.
    bare: usize,
    bytes: usize,
}

struct Call<T> {
    request: u64,
    /// None when it is not kept.
    answer: Option<T>,
    bytes: usize,
}

impl<T> Clone for Keys<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Keys<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            calls: HashMap::new(),
            ended: VecDeque::new(),
            bare: 0,
            bytes: 0,
        })))
    }
}

impl<T: Clone> Keys<T> {
    /// Looks the request's key up; a new one is remembered with `answer`.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` when the key came with another request to `method` before, or is too long;
    /// `ALREADY_EXISTS` when what would answer it again is not kept.
    pub fn claim<Req: Keyed>(
        &self,
        method: &'static str,
        request: &mut Req,
        answer: impl FnOnce() -> T,
    ) -> Result<Claim<T>, Status> {
        // Another try of the same request may have other metadata.
        let metadata = request.metadata().take();
        let wanted = metadata.as_ref().map_or("", |metadata| &metadata.idempotency_key);
        if wanted.is_empty() {
            *request.metadata() = metadata;
            return Ok(Claim::Unkeyed);
        }
        if wanted.len() > LONGEST_KEY {
            return Err(Status::invalid_argument(format!(
                "{method}: an idempotency key has at most {LONGEST_KEY} bytes, this one {}",
                wanted.len()
            )));
        }
        let key = (method, wanted.to_owned());
        let fingerprint = fingerprint(request);
        *request.metadata() = metadata;
        let mut state = self.lock();
        state.forget_old();
        if let Some(call) = state.calls.get(&key) {
            if call.request != fingerprint {
                return Err(Status::invalid_argument(format!(
                    "{method}: the idempotency key {:?} came with another request before",
                    key.1
                )));
            }
            return call.answer.clone().map(Claim::Again).ok_or_else(|| {
                Status::already_exists(format!(
                    "{method}: the call with the idempotency key {:?} was made before, and its answer is not kept",
                    key.1
                ))
            });
        }
        let call = Call {
            request: fingerprint,
            answer: Some(answer()),
            bytes: 0,
        };
        state.calls.insert(key.clone(), call);
        drop(state);
        Ok(Claim::First(Ticket {
            keys: self.clone(),
            key,
        }))
    }
}

impl<T> Keys<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    fn forget_old(&mut self) {
        while let Some((end, key)) = self.ended.front()
            && (self.ended.len() > KEPT_CALLS || end.elapsed() >= KEPT_FOR)
        {
            if let Some(call) = self.calls.remove(key) {
                self.bytes -= call.bytes;
            }
            self.ended.pop_front();
            self.bare = self.bare.saturating_sub(1);
        }
    }

    /// Drops ended calls' answers, the oldest first, until `wanted` more bytes fit, if they ever do.
    fn make_room(&mut self, wanted: usize) -> bool {
        if wanted > KEPT_BYTES {
            return false;
        }
        while self.bytes + wanted > KEPT_BYTES {
            let Some((_, key)) = self.ended.get(self.bare) else {
                return false;
            };
            self.bare += 1;
            if let Some(call) = self.calls.get_mut(key) {
                self.bytes -= std::mem::take(&mut call.bytes);
                call.answer = None;
            }
        }
        true
    }
}

/// A first call under way. Dropping it says that the call has ended.
pub struct Ticket<T> {
    keys: Keys<T>,
    key: Key,
}

impl<T> Ticket<T> {
    /// Accounts for `bytes` more of the answer. When they do not fit the answer is dropped, and this is false.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let mut state = self.keys.lock();
        let state = &mut *state;
        let fits = state.make_room(bytes);
        let Some(call) = state.calls.get_mut(&self.key).filter(|call| call.answer.is_some()) else {
            return false;
        };
        if fits {
            call.bytes += bytes;
            state.bytes += bytes;
        } else {
            state.bytes -= std::mem::take(&mut call.bytes);
            call.answer = None;
        }
        fits
    }

    /// Keeps the key, and not what answers it again.
    pub fn drop_answer(&mut self) {
        let mut state = self.keys.lock();
        if let Some(call) = state.calls.get_mut(&self.key) {
            call.answer = None;
            let bytes = std::mem::take(&mut call.bytes);
            state.bytes -= bytes;
        }
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        let mut state = self.keys.lock();
        let key = std::mem::take(&mut self.key.1);
        state.ended.push_back((Instant::now(), (self.key.0, key)));
        state.forget_old();
    }
}

/// Equal for equal requests, as the same build of the agent encodes them: their maps are sorted.
fn fingerprint(request: &impl Message) -> u64 {
    let mut hasher = DefaultHasher::new();
    request.encode_to_vec().hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tonic::Code;

    use super::*;
    use crate::proto::{OciExecRequest, OciExecResponse};

    fn request(key: &str, command: &str) -> OciExecRequest {
        OciExecRequest {
            command: command.into(),
            env: (0..20).map(|n| (format!("V{n}"), n.to_string())).collect(),
            metadata: Some(TransportMetadata {
                request_id: String::new(),
                idempotency_key: key.into(),
            }),
            ..OciExecRequest::default()
        }
    }

    /// Answers whose calls are counted, and answer with their number and `size` bytes.
    #[derive(Default)]
    struct Counted {
        answers: Answers,
        calls: Arc<AtomicUsize>,
    }

    impl Counted {
        async fn call(&self, method: &'static str, request: OciExecRequest, size: usize) -> Result<i32, Status> {
            let calls = self.calls.clone();
            let answer = self.answers.once(method, request, |_| async move {
                let count = calls.fetch_add(1, Ordering::Relaxed) + 1;
                tokio::task::yield_now().await;
                Ok(OciExecResponse {
                    exit_code: i32::try_from(count).unwrap(),
                    stdout: "x".repeat(size),
                    ..OciExecResponse::default()
                })
            });
            answer.await.map(|response| response.into_inner().exit_code)
        }
    }

    #[tokio::test]
    async fn a_key_answers_again_and_without_one_every_call_counts() {
        let counted = Counted::default();
        assert_eq!(counted.call("A", request("k", "one"), 0).await.unwrap(), 1);
        let mut again = request("k", "one");
        again.metadata.as_mut().unwrap().request_id = "another try".into();
        assert_eq!(counted.call("A", again, 0).await.unwrap(), 1);
        assert_eq!(counted.call("B", request("k", "one"), 0).await.unwrap(), 2);
        assert_eq!(counted.call("A", request("", "one"), 0).await.unwrap(), 3);
        assert_eq!(counted.call("A", request("", "one"), 0).await.unwrap(), 4);
    }

    #[tokio::test]
    async fn a_key_belongs_to_its_request() {
        let counted = Counted::default();
        counted.call("A", request("k", "one"), 0).await.unwrap();
        let refused = counted.call("A", request("k", "two"), 0).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("\"k\""), "{refused:?}");
        let long = counted
            .call("A", request(&"k".repeat(2000), "one"), 0)
            .await
            .unwrap_err();
        assert_eq!(long.code(), Code::InvalidArgument);
    }

    #[tokio::test]
    async fn a_failure_is_an_answer_too() {
        let answers = Answers::default();
        for text in ["first", "second"] {
            let answer: Result<Response<OciExecResponse>, Status> = answers
                .once(
                    "A",
                    request("k", "one"),
                    |_| async move { Err(Status::not_found(text)) },
                )
                .await;
            let status = answer.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::NotFound, "first"));
        }
    }

    #[tokio::test]
    async fn a_second_call_waits_for_the_first_even_when_its_client_is_gone() {
        let (open, gate) = tokio::sync::oneshot::channel::<()>();
        let answers = Answers::default();
        let first = tokio::spawn({
            let answers = answers.clone();
            let call = |_| async move {
                gate.await.unwrap();
                Ok(OciExecResponse {
                    exit_code: 7,
                    ..OciExecResponse::default()
                })
            };
            async move { answers.once("A", request("k", "one"), call).await }
        });
        tokio::task::yield_now().await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let never = |_| async { panic!("the work is done twice") };
        let second = answers.once::<_, OciExecResponse, _>("A", request("k", "one"), never);
        open.send(()).unwrap();
        assert_eq!(second.await.unwrap().into_inner().exit_code, 7);
    }

    #[tokio::test]
    async fn answers_are_bounded_in_bytes_and_their_keys_stay() {
        let counted = Counted::default();
        for number in 0..10 {
            let key = format!("key {number}");
            counted.call("A", request(&key, "one"), 1 << 20).await.unwrap();
        }
        assert!(counted.answers.0.lock().bytes <= KEPT_BYTES);
        assert_eq!(counted.call("A", request("key 9", "one"), 0).await.unwrap(), 10);
        let dropped = counted.call("A", request("key 0", "one"), 0).await.unwrap_err();
        assert_eq!(dropped.code(), Code::AlreadyExists);
        // One that never fits is answered all the same, once.
        assert_eq!(counted.call("A", request("huge", "one"), KEPT_BYTES).await.unwrap(), 11);
        let huge = counted.call("A", request("huge", "one"), KEPT_BYTES).await.unwrap_err();
        assert_eq!(huge.code(), Code::AlreadyExists);
        assert_eq!(counted.call("A", request("key 9", "one"), 0).await.unwrap(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_bounded_in_number_and_time() {
        let counted = Counted::default();
        for number in 0..=KEPT_CALLS {
            let key = format!("key {number}");
            counted.call("A", request(&key, "one"), 0).await.unwrap();
        }
        let made = i32::try_from(KEPT_CALLS).unwrap() + 1;
        assert_eq!(counted.answers.0.lock().calls.len(), KEPT_CALLS);
        assert_eq!(counted.call("A", request("key 1", "one"), 0).await.unwrap(), 2);
        assert_eq!(counted.call("A", request("key 0", "one"), 0).await.unwrap(), made + 1);
        tokio::time::advance(KEPT_FOR).await;
        assert_eq!(counted.call("A", request("key 9", "one"), 0).await.unwrap(), made + 2);
        let state = counted.answers.0.lock();
        assert_eq!((state.calls.len(), state.ended.len(), state.bare), (1, 1, 0));
    }
}
