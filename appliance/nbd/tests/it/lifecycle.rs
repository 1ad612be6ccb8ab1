//! How connections end, and what is promised then: told once, promptly, and nothing runs later.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use srn_nbd::client::{Client, ClientError, ConnectOptions};
use srn_nbd::proto::constants::{chunk, command, command_flag, option};
use srn_nbd::proto::{BlockSizes, ErrorCode, ExportInfo, ExportSummary, OpenError};
use srn_nbd::server::{
    Backend, ClientInfo, Export, Limits, PayloadBudget, Peer, Reply, Request, Server,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::support::backend::pattern;
use crate::support::{Fixture, Raw, SIZE, logs, option_bytes, until, uri, within};

/// The client vanishes with requests in flight: the export is told once and at once, and replies
/// that come too late reach nobody, least of all who connects next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_vanishes() {
    let fixture = Fixture::start().await;
    let mut clients = Vec::new();
    for round in 0..20 {
        let mut raw = Raw::using(fixture.tcp, "held", round % 2 == 0).await;
        clients.extend(fixture.clients());
        for cookie in 0..30 {
            raw.request(command::READ, 0, cookie, 0, 65_536).await;
        }
        until("submission", || fixture.held.waiting() == 30).await;
        drop(raw);
        until("closing", || fixture.closed() == 2 * round + 1).await;
        // The new connection most likely has the number of the old one's socket.
        let mut next = Raw::using(fixture.tcp, "held", true).await;
        for (index, (_, reply)) in fixture.held.take().into_iter().enumerate() {
            match index % 3 {
                0 => reply.data(vec![6; 65_536]),
                1 => reply.error(ErrorCode::Io, "too late"),
                _ => drop(reply),
            }
        }
        next.request(command::FLUSH, 0, 4711, 0, 0).await;
        until("submission", || fixture.held.waiting() == 1).await;
        next.assert_silent();
        fixture.held.take().remove(0).1.ok();
        assert_eq!(next.simple().await, (0, 4711));
        next.assert_silent();
        drop(next);
        until("closing", || fixture.closed() == 2 * round + 2).await;
    }
    assert_eq!((fixture.opened(), fixture.closed()), (40, 40));
    // It is no error of the server's, and dropping requests is what it asks of the backend.
    assert_eq!(logs::errors_of(&clients), Vec::<String>::new());
    assert_eq!(fixture.budget.available(), PayloadBudget::default().available());
}

/// A reader that waits for room does not read, and still sees the client go.
#[tokio::test]
async fn a_client_that_vanishes_while_it_is_held_back() {
    for (limits, budget) in [
        (Limits { requests: 4, ..Limits::default() }, 1 << 20),
        (Limits { payload_bytes: 10_000, ..Limits::default() }, 1 << 20),
        (Limits::default(), 10_000),
    ] {
        let fixture = Fixture::with(limits, PayloadBudget::new(budget)).await;
        let mut raw = Raw::using(fixture.tcp, "held", false).await;
        for cookie in 0..100 {
            raw.request(command::READ, 0, cookie, 0, 4096).await;
        }
        until("submission", || fixture.held.waiting() >= 2).await;
        assert!(fixture.held.waiting() < 10);
        drop(raw);
        until("closing", || fixture.closed() == 1).await;
        drop(fixture.held.take());
        assert_eq!(fixture.budget.available(), budget);
    }
}

#[tokio::test]
async fn a_client_that_vanishes_in_the_middle_of_a_payload() {
    let fixture = Fixture::start().await;
    for length in [4096, 100_000 & !511, 1 << 20] {
        let closed = fixture.closed();
        let mut raw = Raw::using(fixture.tcp, "held", false).await;
        raw.request(command::WRITE, 0, 1, 0, length).await;
        raw.send(&vec![1; length as usize / 2]).await;
        drop(raw);
        until("closing", || fixture.closed() == closed + 1).await;
    }
    assert_eq!(fixture.held.waiting(), 0, "half a request is none");
    assert_eq!(fixture.budget.available(), PayloadBudget::default().available());
}

/// After a goodbye everything in flight is still done and answered, then the server closes.
#[tokio::test]
async fn a_goodbye_waits_for_what_is_in_flight() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "held", false).await;
    for cookie in 0..5 {
        raw.request(command::TRIM, 0, cookie, 0, 4096).await;
    }
    raw.request(command::DISC, 0, 99, 0, 0).await;
    // Nothing after a goodbye counts.
    raw.request(command::TRIM, 0, 100, 0, 4096).await;
    until("submission", || fixture.held.waiting() == 5).await;
    assert_eq!(fixture.closed(), 0);
    for (_, reply) in fixture.held.take() {
        reply.ok();
    }
    for cookie in 0..5 {
        assert_eq!(raw.simple().await, (0, cookie));
    }
    raw.assert_closed().await;
    until("closing", || fixture.closed() == 1).await;
    assert_eq!(fixture.held.waiting(), 0);
}

/// Unless the client does not stay to hear of it: then it may be asking again over a new connection.
#[tokio::test]
async fn a_goodbye_without_waiting() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "held", false).await;
    raw.request(command::TRIM, 0, 1, 0, 4096).await;
    raw.request(command::DISC, 0, 99, 0, 0).await;
    until("submission", || fixture.held.waiting() == 1).await;
    assert_eq!(fixture.closed(), 0, "it may still wait for its answer");
    drop(raw);
    until("closing", || fixture.closed() == 1).await;
    assert_eq!(fixture.held.waiting(), 1, "the backend was told before it was done");
}

#[tokio::test]
async fn requests_arrive_in_order() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "held", false).await;
    let mut expected = Vec::new();
    for index in 0..40u64 {
        let offset = index * 4096;
        match index % 5 {
            0 => {
                raw.request(command::FLUSH, 0, index, 0, 0).await;
                expected.push(Request::Flush);
            }
            1 => {
                raw.request(command::TRIM, 1, index, offset, 512).await;
                expected.push(Request::Trim { offset, length: 512, fua: true });
            }
            large => {
                let length = if large == 2 { 131_072 } else { 1536 };
                let data = pattern(index, 0, length);
                let fua = index % 2 == 1;
                raw.request(command::WRITE, u16::from(fua), index, offset, length as u32).await;
                raw.send(&data).await;
                expected.push(Request::Write { offset, data, fua });
            }
        }
    }
    until("submission", || fixture.held.waiting() == 40).await;
    let taken: Vec<_> = fixture.held.take();
    for ((request, _), expected) in taken.iter().zip(&expected) {
        assert_eq!(request, expected);
        if let Request::Write { data, .. } = request
            && data.len() >= 65_536
        {
            assert_eq!(data.as_ptr().align_offset(4096), 0, "fit for O_DIRECT");
        }
    }
    // Answers in any other order reach their requests.
    for (_, reply) in taken.into_iter().rev() {
        reply.ok();
    }
    for cookie in (0..40).rev() {
        assert_eq!(raw.simple().await, (0, cookie));
    }
}

#[tokio::test]
async fn requests_arrive_as_they_were_sent() {
    use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "held", true).await;
    let (offset, length) = (4096, 1024);
    let zeroes = |no_hole, fast, fua| Request::WriteZeroes { offset, length, no_hole, fast, fua };
    let status = |one| Request::BlockStatus { offset, length, one };
    for (command, flags, expected) in [
        (command::READ, FUA | DF, Request::Read { offset, length }),
        (command::WRITE_ZEROES, 0, zeroes(false, false, false)),
        (command::WRITE_ZEROES, NO_HOLE, zeroes(true, false, false)),
        (command::WRITE_ZEROES, FAST_ZERO, zeroes(false, true, false)),
        (command::WRITE_ZEROES, FUA, zeroes(false, false, true)),
        (command::TRIM, 0, Request::Trim { offset, length, fua: false }),
        (command::CACHE, 0, Request::Cache { offset, length }),
        (command::BLOCK_STATUS, 0, status(false)),
        (command::BLOCK_STATUS, REQ_ONE, status(true)),
    ] {
        raw.request(command, flags, 1, offset, length).await;
        until("submission", || fixture.held.waiting() == 1).await;
        let (request, reply) = fixture.held.take().remove(0);
        assert_eq!(request, expected);
        reply.error(ErrorCode::NotSupported, "");
        let (_, kind, _, payload) = raw.chunk().await;
        assert_eq!((kind, &payload[..4]), (chunk::ERROR, &[0, 0, 0, 95][..]));
    }
}

#[tokio::test]
async fn a_shutdown_answers_what_is_in_flight() {
    let fixture = Fixture::start().await;
    let mut idle = Raw::using(fixture.tcp, "disk", false).await;
    let mut greeted = Raw::greeted(fixture.tcp).await;
    let mut busy = Raw::using(fixture.tcp, "held", false).await;
    busy.request(command::FLUSH, 0, 1, 0, 0).await;
    until("submission", || fixture.held.waiting() == 1).await;
    let shutdown = tokio::spawn({
        let server = fixture.server.clone();
        async move { server.shutdown(Duration::from_secs(600)).await }
    });
    idle.assert_closed().await;
    greeted.assert_closed().await;
    busy.request(command::FLUSH, 0, 2, 0, 0).await;
    fixture.held.take().remove(0).1.ok();
    assert_eq!(busy.simple().await, (0, 1));
    busy.assert_closed().await;
    within("shutdown", shutdown).await.unwrap();
    assert_eq!((fixture.opened(), fixture.closed()), (2, 2));
    assert_eq!(fixture.held.waiting(), 0, "a request after the shutdown was taken");
    // Nobody listens any more, and the socket file is gone.
    until("refusal", || std::net::TcpStream::connect(fixture.tcp).is_err()).await;
    until("removal", || !fixture.socket().exists()).await;
}

#[tokio::test]
async fn a_shutdown_has_an_end() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "held", false).await;
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    until("submission", || fixture.held.waiting() == 1).await;
    within("shutdown", fixture.server.shutdown(Duration::from_millis(50))).await;
    assert_eq!(fixture.closed(), 1);
    raw.assert_closed().await;
    fixture.held.take().remove(0).1.ok();
}

#[tokio::test]
async fn a_connection_can_be_dropped_on_demand() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "held", false).await;
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    until("submission", || fixture.held.waiting() == 1).await;
    let connection = fixture.server.connections()[0].client.connection;
    assert!(fixture.server.disconnect(connection));
    raw.assert_closed().await;
    until("closing", || fixture.closed() == 1).await;
    until("forgetting", || !fixture.server.disconnect(connection)).await;
    fixture.assert_healthy().await;
}

#[tokio::test]
async fn a_unix_peer_is_known() {
    let fixture = Fixture::start().await;
    let options = ConnectOptions::default();
    let client = Client::connect(&uri(&fixture.unix_uri("disk")), &options).await.unwrap();
    let status = fixture.server.connections();
    let Peer::Unix { process, user, .. } = status[0].client.peer else { panic!("{status:?}") };
    assert_eq!(process, Some(std::process::id() as i32));
    assert_eq!(
        user,
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap())
    );
    // A pair of sockets works as well.
    let (ours, theirs) = UnixStream::pair().unwrap();
    fixture.server.serve_unix(theirs).unwrap();
    let pair = Client::over_unix(ours, "disk", &options).await.unwrap();
    pair.write(512, pattern(3, 0, 512), true).await.unwrap();
    assert_eq!(client.read(512, 512).await.unwrap(), pattern(3, 0, 512));
}

#[tokio::test]
async fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = srn_nbd::server::Listener::unix(&path).await.unwrap();
    let second = srn_nbd::server::Listener::unix(&path).await.unwrap_err();
    assert_eq!(second.kind(), std::io::ErrorKind::AddrInUse);
    drop(listener);
    assert!(!path.exists());
}

/// A backend that takes its time, and says what became of it.
#[derive(Default)]
struct Slow {
    opening: AtomicUsize,
    abandoned: AtomicUsize,
    go_on: AtomicBool,
    refuse: AtomicBool,
    info: Mutex<Option<ExportInfo>>,
    closed: Arc<AtomicUsize>,
}

struct SlowExport(ExportInfo, Arc<AtomicUsize>);

impl Export for SlowExport {
    fn info(&self) -> ExportInfo {
        self.0.clone()
    }

    fn submit(&self, _: Request, reply: Reply) {
        reply.ok();
    }

    fn closed(&self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

impl Backend for Slow {
    fn list(&self, _: &ClientInfo) -> Vec<ExportSummary> {
        Vec::new()
    }

    fn describe(&self, _: &str, _: &ClientInfo) -> Result<ExportInfo, OpenError> {
        Err(OpenError::NotFound)
    }

    async fn open(&self, _: &str, _: &ClientInfo) -> Result<Arc<dyn Export>, OpenError> {
        struct Abandon<'a>(&'a AtomicUsize);
        impl Drop for Abandon<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.opening.fetch_add(1, Ordering::SeqCst);
        let abandon = Abandon(&self.abandoned);
        while !self.go_on.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        std::mem::forget(abandon);
        if self.refuse.load(Ordering::SeqCst) {
            return Err(OpenError::Busy("by a ghost".to_owned()));
        }
        let info = self.info.lock().unwrap().clone();
        let info = info.unwrap_or_else(|| ExportInfo::writable(SIZE));
        Ok(Arc::new(SlowExport(info, Arc::clone(&self.closed))))
    }
}

fn slow_server(limits: Limits) -> (Server<Slow>, Arc<Slow>) {
    let backend = Arc::new(Slow::default());
    (Server::new(Arc::clone(&backend), limits, PayloadBudget::default()), backend)
}

#[tokio::test]
async fn opening_may_outlast_the_handshake_and_the_client() {
    let limits = Limits { handshake: Duration::from_millis(100), ..Limits::default() };
    let (server, backend) = slow_server(limits);
    let (mut gone, theirs) = UnixStream::pair().unwrap();
    server.serve_unix(theirs).unwrap();
    let (patient, theirs) = UnixStream::pair().unwrap();
    server.serve_unix(theirs).unwrap();
    gone.write_all(&[0, 0, 0, 3]).await.unwrap();
    gone.write_all(&option_bytes(option::GO, &Raw::go_payload("x"))).await.unwrap();
    let options = ConnectOptions { structured: false, ..ConnectOptions::default() };
    let patient = tokio::spawn(async move { Client::over_unix(patient, "x", &options).await });
    until("opening", || backend.opening.load(Ordering::SeqCst) == 2).await;
    drop(gone);
    until("abandoning", || backend.abandoned.load(Ordering::SeqCst) == 1).await;
    until("forgetting", || server.connections().len() == 1).await;
    // Longer than the whole handshake may take, if it were not for the backend.
    tokio::time::sleep(Duration::from_millis(150)).await;
    backend.go_on.store(true, Ordering::SeqCst);
    let patient = within("opening", patient).await.unwrap().unwrap();
    patient.flush().await.unwrap();
    drop(patient);
    until("closing", || backend.closed.load(Ordering::SeqCst) == 1).await;
}

/// After a refusal that took long, the handshake still has all of its time.
#[tokio::test]
async fn a_refusal_may_outlast_the_handshake() {
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let (server, backend) = slow_server(limits);
    backend.refuse.store(true, Ordering::SeqCst);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    server.serve_unix(theirs).unwrap();
    ours.write_all(&[0, 0, 0, 3]).await.unwrap();
    ours.write_all(&option_bytes(option::GO, &Raw::go_payload("x"))).await.unwrap();
    until("opening", || backend.opening.load(Ordering::SeqCst) == 1).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    backend.go_on.store(true, Ordering::SeqCst);
    let mut bytes = vec![0; 18 + 20 + "in use: by a ghost".len()];
    within("refusal", ours.read_exact(&mut bytes)).await.unwrap();
    assert!(bytes.ends_with(b"in use: by a ghost"));
    ours.write_all(&option_bytes(option::LIST, &[])).await.unwrap();
    within("listing", ours.read_exact(&mut bytes[..20])).await.unwrap();
}

#[tokio::test]
async fn an_export_that_is_described_wrongly_is_closed_again() {
    let (server, backend) = slow_server(Limits::default());
    backend.go_on.store(true, Ordering::SeqCst);
    let block_sizes = BlockSizes { minimum: 3, preferred: 4096, maximum: 4096 };
    let wrong = ExportInfo { block_sizes, ..ExportInfo::writable(SIZE) };
    *backend.info.lock().unwrap() = Some(wrong);
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.serve_unix(theirs).unwrap();
    let options = ConnectOptions::default();
    let refused = Client::over_unix(ours, "x", &options).await.unwrap_err();
    assert!(refused.to_string().contains("described it wrongly"), "{refused}");
    assert_eq!(backend.closed.load(Ordering::SeqCst), 1);
}

/// One that sits on the whole budget of the node does not stop the others.
#[tokio::test]
async fn the_budget_of_the_node_is_no_lever() {
    let budget = PayloadBudget::new(1 << 20);
    let fixture = Fixture::with(Limits::default(), budget.clone()).await;
    let hog = fixture.client("held").await;
    let write = tokio::spawn({
        let data = Bytes::from(vec![1; 1 << 20]);
        async move { hog.write(0, data, false).await }
    });
    until("submission", || fixture.held.waiting() == 1).await;
    assert_eq!(budget.available(), 0);
    let other = fixture.client("disk").await;
    let small = pattern(1, 0, 256 << 10);
    within("writing", other.write(0, small.clone(), false)).await.unwrap();
    assert_eq!(within("reading", other.read(0, 256 << 10)).await.unwrap(), small);
    // What is larger waits for its share, and gets it.
    let large = tokio::spawn(async move { other.read(0, 1 << 20).await });
    fixture.held.take().remove(0).1.ok();
    write.await.unwrap().unwrap();
    assert_eq!(within("reading", large).await.unwrap().unwrap().len(), 1 << 20);
    until("release", || budget.available() == 1 << 20).await;
}

#[tokio::test]
async fn a_client_says_goodbye_and_is_then_closed() {
    let fixture = Fixture::start().await;
    let client = fixture.client("disk").await;
    let clone = client.clone();
    clone.write(0, pattern(1, 0, 512), false).await.unwrap();
    within("goodbye", client.disconnect()).await.unwrap();
    let after = within("reading", clone.read(0, 512)).await.unwrap_err();
    assert!(matches!(after, ClientError::Closed), "{after}");
    let again = within("goodbye", client.disconnect()).await.unwrap_err();
    assert!(matches!(again, ClientError::Closed), "{again}");
    until("closing", || fixture.closed() == 1).await;
}

#[tokio::test]
async fn calls_of_one_client_are_in_flight_together() {
    let fixture = Fixture::start().await;
    let client = fixture.client("held").await;
    let calls: Vec<_> = (0..100u64)
        .map(|index| {
            let client = client.clone();
            tokio::spawn(async move { client.read(index * 512, 512).await.unwrap() })
        })
        .collect();
    until("submission", || fixture.held.waiting() == 100).await;
    for (request, reply) in fixture.held.take().into_iter().rev() {
        let Request::Read { offset, .. } = request else { panic!("{request:?}") };
        reply.data(vec![(offset / 512) as u8; 512]);
    }
    for (index, call) in calls.into_iter().enumerate() {
        assert_eq!(within("reading", call).await.unwrap(), vec![index as u8; 512]);
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_forgets_only_its_answer() {
    let fixture = Fixture::start().await;
    let options = ConnectOptions { requests: 2, ..ConnectOptions::default() };
    let client = fixture.client_with("held", &options).await;
    for _ in 0..2 {
        let read = tokio::spawn({
            let client = client.clone();
            async move { client.read(0, 4096).await }
        });
        let waiting = fixture.held.waiting();
        until("submission", || fixture.held.waiting() == waiting + 1).await;
        read.abort();
        assert!(read.await.unwrap_err().is_cancelled());
    }
    // The two are still in flight at the server, so a third has to wait for its turn.
    let third = tokio::spawn({
        let client = client.clone();
        async move { client.flush().await }
    });
    for (_, reply) in fixture.held.take() {
        reply.data(vec![1; 4096]);
    }
    until("submission", || fixture.held.waiting() == 1).await;
    fixture.held.take().remove(0).1.ok();
    within("flushing", third).await.unwrap().unwrap();
}
