//! One command's events on their way to its clients: the call that started it, and, when that had an idempotency key,
//! every later one of the connection with it.
//!
//! The command waits for the slowest client. What is sent is remembered, for those who come later, as long as the
//! connection has room for it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;

use crate::idempotency::Ticket;
use crate::proto::ExecEvent;
use crate::proto::exec_event::Event;

/// Events that wait for a slow client. A full queue leaves the output in the command's pipes, and then the command
/// waits: so a command holds at most `QUEUE * CHUNK` bytes here, whatever it prints.
const QUEUE: usize = 8;

/// What clients attach to. A clone is another handle.
#[derive(Clone, Default)]
pub struct Feed(Arc<Mutex<State>>);

struct State {
    clients: Vec<mpsc::Sender<Result<ExecEvent, Status>>>,
    /// All events until now; `None` when there were too many, or nobody may come later.
    past: Option<Vec<ExecEvent>>,
    ended: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            clients: Vec::new(),
            past: Some(Vec::new()),
            ended: false,
        }
    }
}

/// The stream that one client gets.
pub struct Events {
    past: std::vec::IntoIter<ExecEvent>,
    live: mpsc::Receiver<Result<ExecEvent, Status>>,
    request_id: String,
}

impl Stream for Events {
    type Item = Result<ExecEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = match self.past.next() {
            Some(event) => Some(Ok(event)),
            None => std::task::ready!(self.live.poll_recv(cx)),
        };
        Poll::Ready(next.map(|event| {
            event.map(|event| ExecEvent {
                request_id: self.request_id.clone(),
                ..event
            })
        }))
    }
}

impl Feed {
    /// A feed, and the stream of its first client.
    #[must_use]
    pub fn start(request_id: String) -> (Self, Events) {
        let (sender, live) = mpsc::channel(QUEUE);
        let feed = Self::default();
        feed.lock().clients.push(sender);
        let past = Vec::new().into_iter();
        (feed, Events { past, live, request_id })
    }

    /// Attaches a client, which gets all events from the first on; `None` when they are not kept.
    #[must_use]
    pub fn attach(&self, request_id: String) -> Option<Events> {
        let (sender, live) = mpsc::channel(QUEUE);
        let mut state = self.lock();
        let past = state.past.clone()?;
        if !state.ended {
            state.clients.push(sender);
        }
        Some(Events {
            past: past.into_iter(),
            live,
            request_id,
        })
    }

    /// Returns once all clients have gone. From then on none can attach.
    pub async fn abandoned(&self) {
        loop {
            let client = {
                let mut state = self.lock();
                state.clients.retain(|client| !client.is_closed());
                let Some(client) = state.clients.first() else {
                    state.past = None;
                    return;
                };
                client.clone()
            };
            client.closed().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending side: numbers events. Dropping it ends all streams.
pub struct Publisher {
    feed: Feed,
    /// None without a key.
    ticket: Option<Ticket<Feed>>,
    sequence: u64,
    exec_id: u64,
}

impl Publisher {
    /// Publishes on a feed, whose events are remembered when there is a ticket.
    #[must_use]
    pub fn new(feed: Feed, ticket: Option<Ticket<Feed>>, exec_id: u64) -> Self {
        Self {
            feed,
            ticket,
            sequence: 0,
            exec_id,
        }
    }

    /// Sends the next event to all clients and waits until each has room for it. Without a client it is only
    /// remembered.
    pub async fn send(&mut self, event: Event) {
        self.sequence += 1;
        let event = ExecEvent {
            event: Some(event),
            sequence: self.sequence,
            request_id: String::new(),
            exec_id: if self.sequence == 1 { self.exec_id } else { 0 },
        };
        self.remember(&event);
        self.pass_on(&Ok(event)).await;
    }

    /// Ends all streams with `status`, which is no event.
    pub async fn fail(mut self, status: Status) {
        self.forget();
        self.pass_on(&Err(status)).await;
    }

    async fn pass_on(&self, event: &Result<ExecEvent, Status>) {
        // Who attaches from here on has this event in its past.
        let clients = self.feed.lock().clients.clone();
        for client in clients {
            // One that is gone needs no event.
            let _ = client.send(event.clone()).await;
        }
    }

    fn remember(&mut self, event: &ExecEvent) {
        let size = size_of::<ExecEvent>() + payload(event);
        if self.ticket.as_mut().is_some_and(|ticket| ticket.grow(size)) {
            if let Some(past) = &mut self.feed.lock().past {
                past.push(event.clone());
            }
        } else {
            self.forget();
        }
    }

    /// Has a second call be another one.
    pub fn forget(&mut self) {
        if let Some(ticket) = &mut self.ticket {
            ticket.forget();
        }
        self.feed.lock().past = None;
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        let mut state = self.feed.lock();
        state.ended = true;
        state.clients.clear();
    }
}

fn payload(event: &ExecEvent) -> usize {
    match &event.event {
        Some(Event::Stdout(data) | Event::Stderr(data)) => data.len(),
        Some(Event::Error(text)) => text.len(),
        Some(Event::ExitCode(_)) | None => 0,
    }
}

#[cfg(test)]
mod tests {
    use prost::bytes::Bytes;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::idempotency::{KEPT_BYTES, Keys};

    fn keyed() -> (Feed, Publisher) {
        let feed = Feed::default();
        let ticket = Keys::default().remember(1, feed.clone());
        (feed.clone(), Publisher::new(feed, ticket, 7))
    }

    fn chunk(size: usize) -> Event {
        Event::Stdout(Bytes::from(vec![b'x'; size]))
    }

    async fn sequences(events: Events) -> Vec<u64> {
        events.map(|event| event.unwrap().sequence).collect().await
    }

    #[tokio::test]
    async fn clients_get_all_events_whenever_they_come() {
        let (feed, mut publisher) = keyed();
        let early = feed.attach("early".into()).unwrap();
        publisher.send(chunk(1)).await;
        let midway = feed.attach("midway".into()).unwrap();
        publisher.send(chunk(1)).await;
        publisher.send(Event::ExitCode(0)).await;
        drop(publisher);
        let late = feed.attach("late".into()).unwrap();
        for events in [early, midway, late] {
            assert_eq!(sequences(events).await, [1, 2, 3]);
        }
        let mut again = feed.attach("again".into()).unwrap();
        let first = again.next().await.unwrap().unwrap();
        assert_eq!((first.request_id.as_str(), first.exec_id), ("again", 7));
        assert_eq!(again.next().await.unwrap().unwrap().exec_id, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_slowest_client_holds_the_command_up_until_it_leaves() {
        let (feed, mut publisher) = keyed();
        let slow = feed.attach("slow".into()).unwrap();
        let fast = tokio::spawn(sequences(feed.attach("fast".into()).unwrap()));
        let sending = tokio::spawn(async move {
            for _ in 0..20 {
                publisher.send(chunk(1)).await;
            }
        });
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        assert!(!sending.is_finished());
        drop(slow);
        sending.await.unwrap();
        assert_eq!(fast.await.unwrap().len(), 20);
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let (feed, mut publisher) = keyed();
        let first = tokio::spawn(sequences(feed.attach("first".into()).unwrap()));
        for _ in 0..KEPT_BYTES / 16384 - 1 {
            publisher.send(chunk(16384)).await;
        }
        assert!(feed.attach("in time".into()).is_some());
        publisher.send(chunk(16384)).await;
        assert!(feed.attach("too late".into()).is_none());
        assert!(feed.lock().past.is_none());
        drop(publisher);
        assert_eq!(first.await.unwrap().len(), 64);
    }

    #[tokio::test]
    async fn a_command_is_abandoned_when_its_last_client_leaves() {
        let (feed, _publisher) = keyed();
        let first = feed.attach("first".into()).unwrap();
        let abandoned = tokio::spawn({
            let feed = feed.clone();
            async move { feed.abandoned().await }
        });
        let second = feed.attach("second".into()).unwrap();
        tokio::task::yield_now().await;
        drop(first);
        tokio::task::yield_now().await;
        assert!(!abandoned.is_finished());
        drop(second);
        abandoned.await.unwrap();
        assert!(feed.attach("too late".into()).is_none());
    }
}
