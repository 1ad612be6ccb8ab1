//! The client against a scripted peer that breaks every rule QEMU keeps. (Against QEMU itself:
//! `tests/qemu`.)

use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;
const PATIENCE: Duration = Duration::from_secs(20);

/// A peer that greets, negotiates, then does what `script` says.
async fn peer<F, T>(script: F) -> (tempfile::TempDir, Result<Qmp, QmpError>)
where
    F: FnOnce(BufReader<OwnedReadHalf>, OwnedWriteHalf) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    let (folder, listener) = listen();
    let socket = folder.path().join("qmp");
    let (client, server) = tokio::join!(Qmp::connect(&socket, PATIENCE), async {
        let (mut read, mut write) = accept(&listener).await;
        say(&mut write, GREETING).await;
        assert_eq!(hear(&mut read).await["execute"], "qmp_capabilities");
        say(&mut write, r#"{"return": {}}"#).await;
        (read, write)
    });
    tokio::spawn(script(server.0, server.1));
    (folder, client)
}

fn listen() -> (tempfile::TempDir, UnixListener) {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
    (folder, listener)
}

async fn accept(listener: &UnixListener) -> (BufReader<OwnedReadHalf>, OwnedWriteHalf) {
    let (read, write) = listener.accept().await.unwrap().0.into_split();
    (BufReader::new(read), write)
}

async fn say(write: &mut OwnedWriteHalf, line: &str) {
    // The client may have hung up on us already.
    drop(write.write_all(format!("{line}\r\n").as_bytes()).await);
}

async fn hear(read: &mut BufReader<OwnedReadHalf>) -> Value {
    let mut line = String::new();
    read.read_line(&mut line).await.unwrap();
    serde_json::from_str(&line).unwrap_or(Value::Null)
}

#[tokio::test]
async fn answers_find_their_callers_in_any_order() {
    let (_folder, qmp) = peer(async |mut read, mut write| {
        let (first, second) = (hear(&mut read).await, hear(&mut read).await);
        for command in [second, first] {
            let (name, id) = (&command["execute"], &command["id"]);
            say(&mut write, &json!({"return": {"you": name}, "id": id}).to_string()).await;
        }
    })
    .await;
    let qmp = qmp.unwrap();
    let (a, b) = tokio::join!(qmp.execute("a", Value::Null), qmp.execute("b", Value::Null));
    assert_eq!((a.unwrap()["you"].clone(), b.unwrap()["you"].clone()), ("a".into(), "b".into()));
}

#[tokio::test]
async fn a_refusal_has_class_and_words() {
    let (_folder, qmp) = peer(async |mut read, mut write| {
        let id = hear(&mut read).await["id"].clone();
        let error = json!({"class": "DeviceNotFound", "desc": "Cannot find x"});
        say(&mut write, &json!({"error": error, "id": id}).to_string()).await;
    })
    .await;
    let error = qmp.unwrap().execute("q", json!({"id": "x"})).await.unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), "qemu refused q: Cannot find x (DeviceNotFound)");
}

#[tokio::test]
async fn a_late_answer_is_dropped_and_the_connection_lives_on() {
    let (_folder, qmp) = peer(async |mut read, mut write| {
        let late = hear(&mut read).await["id"].clone();
        let next = hear(&mut read).await["id"].clone();
        say(&mut write, &json!({"return": "late", "id": late}).to_string()).await;
        say(&mut write, &json!({"return": "next", "id": next}).to_string()).await;
    })
    .await;
    let qmp = qmp.unwrap();
    let late = qmp.execute_within("slow", Value::Null, Duration::from_millis(50)).await;
    assert!(matches!(late, Err(QmpError::Timeout { .. })), "{late:?}");
    assert_eq!(qmp.execute("next", Value::Null).await.unwrap(), "next");
}

#[tokio::test]
async fn the_end_wakes_callers_and_listeners() {
    let (_folder, qmp) = peer(async |mut read, write| {
        hear(&mut read).await;
        drop(write);
    })
    .await;
    let qmp = qmp.unwrap();
    let mut events = qmp.events();
    let lost = QmpError::Lost { reason: "qemu ended".to_owned() };
    assert_eq!(qmp.execute("quit", Value::Null).await, Err(lost.clone()));
    assert_eq!(events.next().await, Err(event::EventError::Lost(lost.clone())));
    assert!(qmp.is_lost());
    assert_eq!(qmp.execute("again", Value::Null).await, Err(lost.clone()));
    assert_eq!(qmp.events().next().await, Err(event::EventError::Lost(lost)));
}

#[tokio::test]
async fn a_slow_listener_is_told_what_it_missed() {
    let (_folder, qmp) = peer(async |mut read, mut write| {
        let id = hear(&mut read).await["id"].clone();
        for _ in 0..EVENTS_KEPT + 10 {
            let stamp = r#""timestamp": {"seconds": 1, "microseconds": 2}"#;
            say(&mut write, &format!(r#"{{"event": "STOP", {stamp}}}"#)).await;
        }
        say(&mut write, &json!({"return": {}, "id": id}).to_string()).await;
    })
    .await;
    let qmp = qmp.unwrap();
    let mut events = qmp.events();
    // The answer comes after all the events, so they have arrived when it has.
    qmp.execute("begin", Value::Null).await.unwrap();
    assert_eq!(events.next().await, Err(event::EventError::Missed(10)));
    for _ in 0..EVENTS_KEPT {
        assert_eq!(events.next().await.unwrap().kind(), event::Kind::Stop);
    }
    let end = events.next().await;
    assert!(matches!(end, Err(event::EventError::Lost(_))), "{end:?}");
}

#[tokio::test]
async fn an_endless_line_ends_the_connection() {
    let (_folder, qmp) = peer(async |mut read, mut write| {
        hear(&mut read).await;
        let piece = vec![b'['; 1 << 16];
        while write.write_all(&piece).await.is_ok() {}
    })
    .await;
    let error = qmp.unwrap().execute("q", Value::Null).await.unwrap_err();
    assert_eq!(error, QmpError::Lost { reason: "a line was cut off or too long".to_owned() });
}

#[tokio::test]
async fn nonsense_ends_the_connection() {
    let deep = "[".repeat(100_000);
    for line in ["hello", "{}", "[1]", "\u{0}", r#"{"event": 7}"#, deep.as_str()] {
        let line = line.to_owned();
        let (_folder, qmp) = peer(async move |mut read, mut write| {
            hear(&mut read).await;
            say(&mut write, &line).await;
            hear(&mut read).await;
        })
        .await;
        let error = qmp.unwrap().execute("q", Value::Null).await.unwrap_err();
        assert!(matches!(&error, QmpError::Lost { reason } if reason.starts_with("not a message")));
    }
}

#[tokio::test]
async fn too_many_commands_are_refused() {
    let (_folder, qmp) = peer(async |mut read, write| {
        while !hear(&mut read).await.is_null() {}
        drop(write);
    })
    .await;
    let qmp = qmp.unwrap();
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..=IN_FLIGHT_MAX {
        let qmp = qmp.clone();
        waiting.spawn(async move { qmp.execute("wait", Value::Null).await });
    }
    let first = timeout(PATIENCE, waiting.join_next()).await.unwrap().unwrap().unwrap();
    assert_eq!(first, Err(QmpError::Busy), "the one too many");
    assert_eq!(qmp.execute("more", Value::Null).await, Err(QmpError::Busy));
    waiting.abort_all();
    while waiting.join_next().await.is_some() {}
    let free = qmp.execute_within("more", Value::Null, Duration::from_millis(1)).await;
    assert!(matches!(free, Err(QmpError::Timeout { .. })), "places are given back: {free:?}");
}

#[tokio::test]
async fn a_socket_that_is_not_there_and_one_that_is_taken() {
    let (folder, listener) = listen();
    let nowhere = Qmp::connect(&folder.path().join("nowhere"), PATIENCE).await.unwrap_err();
    assert!(matches!(nowhere, QmpError::Connect { .. }), "{nowhere}");
    // A listener that never accepts is what a second client of QEMU meets.
    let taken = Qmp::connect(&folder.path().join("qmp"), Duration::from_millis(50)).await;
    assert!(matches!(taken, Err(QmpError::NoGreeting { .. })), "{taken:?}");
    drop(listener);
}

#[tokio::test]
async fn something_else_at_the_socket_is_noticed() {
    let (folder, listener) = listen();
    let server = async {
        let (_read, mut write) = accept(&listener).await;
        say(&mut write, "220 mail.example ESMTP").await;
    };
    let socket = folder.path().join("qmp");
    let (client, ()) = tokio::join!(Qmp::connect(&socket, PATIENCE), server);
    assert!(matches!(client, Err(QmpError::Lost { .. })), "{client:?}");
}

#[tokio::test]
async fn the_last_clone_closes_the_connection() {
    let (closed, was_closed) = oneshot::channel();
    let (_folder, qmp) = peer(async |mut read, _write| {
        assert!(hear(&mut read).await.is_null());
        closed.send(()).unwrap();
    })
    .await;
    let qmp = qmp.unwrap();
    let clone = qmp.clone();
    let events = qmp.events();
    drop((qmp, clone));
    drop(events);
    timeout(PATIENCE, was_closed).await.unwrap().unwrap();
}
