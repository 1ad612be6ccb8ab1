//! The forms replies take on the wire, and what becomes of a backend's mistakes.

use std::sync::Arc;

use bytes::Bytes;
use srn_nbd::client::ZeroOptions;
use srn_nbd::proto::StatusExtent;
use srn_nbd::proto::constants::{chunk, command, command_flag};
use srn_nbd::server::{ReadChunk, Reply, ReplyBatch, Request};

use crate::support::backend::pattern;
use crate::support::{Fixture, Raw, SIZE, logs, until};

const CELL: u64 = 64 << 10;

/// Data, hole, data: one cell of the memory each.
fn fill(fixture: &Fixture) -> Vec<u8> {
    fixture.memory.fill(0, &pattern(1, 0, CELL as usize));
    fixture.memory.fill(2 * CELL, &pattern(1, 2 * CELL, CELL as usize));
    fixture.memory.contents(0, 3 * CELL as usize)
}

/// Data or hole by its chunk: offset and length.
fn content(kind: u16, payload: &[u8]) -> (u64, u64) {
    let offset = u64::from_be_bytes(payload[..8].try_into().unwrap());
    match kind {
        chunk::OFFSET_DATA => (offset, payload.len() as u64 - 8),
        chunk::OFFSET_HOLE => {
            (offset, u64::from(u32::from_be_bytes(payload[8..].try_into().unwrap())))
        }
        other => panic!("chunk {other}"),
    }
}

#[tokio::test]
async fn a_fragmented_read_tells_holes_apart() {
    let fixture = Fixture::start().await;
    let all = fill(&fixture);
    let mut raw = Raw::using(fixture.tcp, "disk", true).await;
    raw.request(command::READ, 0, 7, 0, 3 * CELL as u32).await;
    for (kind, offset) in
        [(chunk::OFFSET_DATA, 0), (chunk::OFFSET_HOLE, CELL), (chunk::OFFSET_DATA, 2 * CELL)]
    {
        let (flags, told, cookie, payload) = raw.chunk().await;
        assert_eq!((flags, told, cookie), (0, kind, 7));
        assert_eq!(content(kind, &payload), (offset, CELL));
        if kind == chunk::OFFSET_DATA {
            assert!(payload[8..] == all[offset as usize..][..CELL as usize]);
        }
    }
    assert_eq!(raw.chunk().await, (chunk::FLAG_DONE, chunk::NONE, 7, vec![]));
    // Nothing but a hole is one last chunk.
    raw.request(command::READ, 0, 8, CELL, 4096).await;
    let (flags, kind, cookie, payload) = raw.chunk().await;
    assert_eq!((flags, kind, cookie), (chunk::FLAG_DONE, chunk::OFFSET_HOLE, 8));
    assert_eq!(content(kind, &payload), (CELL, 4096));
}

#[tokio::test]
async fn an_unfragmented_read_is_one_chunk() {
    let fixture = Fixture::start().await;
    let all = fill(&fixture);
    let mut raw = Raw::using(fixture.tcp, "disk", true).await;
    raw.request(command::READ, command_flag::DF, 7, 0, 3 * CELL as u32).await;
    let (flags, kind, _, payload) = raw.chunk().await;
    assert_eq!((flags, kind), (chunk::FLAG_DONE, chunk::OFFSET_DATA));
    assert!(payload[8..] == all[..]);
}

#[tokio::test]
async fn a_simple_read_is_spelled_out() {
    let fixture = Fixture::start().await;
    let all = fill(&fixture);
    let mut raw = Raw::using(fixture.tcp, "disk", false).await;
    raw.request(command::READ, 0, 7, 0, 3 * CELL as u32).await;
    assert_eq!(raw.simple().await, (0, 7));
    assert!(raw.take(3 * CELL as usize).await == all);
    // An error has no payload behind it.
    raw.request(command::READ, 0, 8, SIZE, 512).await;
    assert_eq!(raw.simple().await, (22, 8));
    raw.request(command::FLUSH, 0, 9, 0, 0).await;
    assert_eq!(raw.simple().await, (0, 9));
}

#[tokio::test]
async fn block_status_is_merged_and_cut() {
    let fixture = Fixture::start().await;
    fill(&fixture);
    let mut raw = Raw::using(fixture.tcp, "disk", true).await;
    let extents = |payload: &[u8]| -> Vec<(u32, u32)> {
        assert_eq!(payload[..4], [0, 0, 0, 1], "context id");
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        payload[4..].chunks(8).map(|pair| (word(&pair[..4]), word(&pair[4..]))).collect()
    };
    let cell = CELL as u32;
    for (flags, offset, length, expected) in [
        (0, 0, 8 * cell, vec![(cell, 0), (cell, 3), (cell, 0), (5 * cell, 3)]),
        (0, CELL - 512, 1024, vec![(512, 0), (512, 3)]),
        (command_flag::REQ_ONE, 0, 8 * cell, vec![(cell, 0)]),
        (command_flag::REQ_ONE, 3 * CELL, 8 * cell, vec![(8 * cell, 3)]),
    ] {
        raw.request(command::BLOCK_STATUS, flags, 7, offset, length).await;
        let (flags, kind, cookie, payload) = raw.chunk().await;
        assert_eq!((flags, kind, cookie), (chunk::FLAG_DONE, chunk::BLOCK_STATUS, 7));
        assert_eq!(extents(&payload), expected);
    }
}

/// A status as fragmented as can be is cut to what one reply may have.
#[tokio::test]
async fn a_status_of_many_extents_is_cut() {
    let fixture = Fixture::start().await;
    let client = fixture.client("held").await;
    let asking = tokio::spawn(async move { client.allocation(0, SIZE as u32).await });
    until("submission", || fixture.held.waiting() == 1).await;
    let extents: Vec<_> = (0..SIZE / 512)
        .map(|index| if index % 2 == 0 { StatusExtent::data(512) } else { StatusExtent::hole(512) })
        .collect();
    let (_, reply) = fixture.held.take().remove(0);
    reply.extents(&extents);
    let told = asking.await.unwrap().unwrap();
    assert!((1024..extents.len()).contains(&told.len()), "{} extents", told.len());
    assert_eq!(told, extents[..told.len()]);
}

/// Lengths up to the last that fits its field, far past any payload.
#[tokio::test]
async fn ranges_of_four_gibibytes() {
    let fixture = Fixture::start().await;
    let client = fixture.client("huge").await;
    let (last, length) = ((1 << 40) - (1 << 32), u32::MAX - 511);
    for offset in [0, 512, last, last + 512] {
        let told = client.allocation(offset, length).await.unwrap();
        assert_eq!(told, [StatusExtent::data(u64::from(length))]);
        client.trim(offset, length, false).await.unwrap();
        client.write_zeroes(offset, length, ZeroOptions::default()).await.unwrap();
        client.cache(offset, length).await.unwrap();
    }
    let mut raw = Raw::using(fixture.tcp, "huge", false).await;
    raw.request(command::TRIM, 0, 1, last + 1024, length).await;
    assert_eq!(raw.simple().await, (22, 1));
}

/// Many threads answer at once while the client takes its time: no reply is torn by another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replies_of_many_threads_do_not_mix() {
    const READS: u64 = 240;
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "held", true).await;
    for round in 0..5 {
        for index in 0..READS {
            let length = if index % 3 == 0 { 512 } else { 65_536 + 512 };
            raw.request(command::READ, 0, index, index * 131_072, length).await;
        }
        until("submission", || fixture.held.waiting() == READS as usize).await;
        let mut shares: Vec<Vec<_>> = (0..4).map(|_| Vec::new()).collect();
        for (index, held) in fixture.held.take().into_iter().enumerate() {
            shares[index % 4].push(held);
        }
        let threads = shares.into_iter().enumerate().map(|(thread, share)| {
            std::thread::spawn(move || {
                let mut batch = ReplyBatch::new();
                for (request, reply) in share {
                    let Request::Read { offset, length } = request else { panic!("{request:?}") };
                    let data = pattern(round, offset, length as usize);
                    if thread == 0 { batch.data(reply, data) } else { reply.data(data) }
                }
            })
        });
        let threads: Vec<_> = threads.collect();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..READS {
            let (flags, kind, cookie, payload) = raw.chunk().await;
            assert_eq!((flags, kind), (chunk::FLAG_DONE, chunk::OFFSET_DATA));
            let expected = pattern(round, cookie * 131_072, payload.len() - 8);
            assert_eq!(payload[..8], (cookie * 131_072).to_be_bytes());
            assert!(payload[8..] == expected, "reply {cookie} is torn");
            assert!(seen.insert(cookie), "reply {cookie} came twice");
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        raw.assert_silent();
    }
}

/// The client's answer to a read or write the test completes in some way.
async fn completed(write: bool, complete: impl FnOnce(Reply)) -> String {
    let fixture = Fixture::start().await;
    let client = fixture.client("held").await;
    let asking = tokio::spawn({
        let client = client.clone();
        async move {
            if write {
                client.write(0, Bytes::from(vec![1; 512]), false).await.map(|()| Bytes::new())
            } else {
                client.read(0, 1024).await
            }
        }
    });
    until("submission", || fixture.held.waiting() == 1).await;
    let (_, reply) = fixture.held.take().remove(0);
    let clients = fixture.clients();
    complete(reply);
    let answer = match asking.await.unwrap() {
        Ok(data) => format!("{} bytes", data.len()),
        Err(error) => error.to_string(),
    };
    // Whatever the backend did, the stream is intact.
    let flush = tokio::spawn(async move { client.flush().await });
    until("submission", || fixture.held.waiting() == 1).await;
    fixture.held.take().remove(0).1.ok();
    flush.await.unwrap().unwrap();
    let mistake = answer.contains("no proper answer") || answer.contains("was dropped");
    assert_eq!(logs::errors_of(&clients).len(), usize::from(mistake), "a mistake is logged, once");
    answer
}

#[tokio::test]
async fn mistakes_of_a_backend_become_errors() {
    let read = |complete: fn(Reply)| completed(false, complete);
    let no_answer = "server failed to read 1024 bytes at 0: input/output error \
                     (server gave no proper answer)";
    assert_eq!(read(|reply| reply.data(vec![0; 1024])).await, "1024 bytes");
    assert_eq!(read(|reply| reply.data(vec![0; 1023])).await, no_answer);
    assert_eq!(read(|reply| reply.data(vec![0; 1025])).await, no_answer);
    assert_eq!(read(|reply| reply.data(ReadChunk::Hole(1024))).await, "1024 bytes");
    assert_eq!(read(|reply| reply.data(ReadChunk::Hole(u32::MAX))).await, no_answer);
    let parts = |reply: Reply| {
        let data = ReadChunk::Data(Bytes::from(vec![1; 512]));
        let nothing = ReadChunk::Data(Bytes::new());
        reply.data(vec![data, nothing, ReadChunk::Hole(0), ReadChunk::Hole(512)]);
    };
    assert_eq!(read(parts).await, "1024 bytes");
    assert_eq!(read(|reply| reply.data(Vec::<ReadChunk>::new())).await, no_answer);
    assert_eq!(read(Reply::ok).await, no_answer);
    assert_eq!(read(|reply| reply.extents(&[])).await, no_answer);
    assert_eq!(
        read(drop).await,
        "server failed to read 1024 bytes at 0: input/output error (request was dropped)"
    );

    let write = |complete: fn(Reply)| completed(true, complete);
    assert_eq!(write(Reply::ok).await, "0 bytes");
    assert!(write(|reply| reply.data(vec![0; 512])).await.contains("no proper answer"));
    assert!(write(drop).await.contains("request was dropped"));
    let long = |reply: Reply| {
        let text = "\u{fc}".repeat(100_000);
        reply.error(srn_nbd::proto::ErrorCode::NoSpace, &text);
    };
    let told = write(long).await;
    assert!(told.starts_with("server failed to write 512 bytes at 0: no space left"), "{told}");
    assert!(told.len() < 400, "{told}");
}

/// Requests of several connections, completed by another thread, each answered to its own.
#[tokio::test]
async fn a_batch_answers_everybody_once() {
    let fixture = Fixture::start().await;
    let mut raws = Vec::new();
    for structured in [true, false, true] {
        raws.push(Raw::using(fixture.tcp, "held", structured).await);
    }
    for round in 0..50u64 {
        for (index, raw) in raws.iter_mut().enumerate() {
            raw.request(command::WRITE_ZEROES, 0, round * 10 + index as u64, 0, 512).await;
        }
        if round == 25 {
            // One of them goes away with requests in the batch.
            drop(raws.pop());
            let expected = Arc::clone(&fixture.exports);
            let closed = || expected.closed.load(std::sync::atomic::Ordering::SeqCst) == 1;
            until("closing", closed).await;
        }
    }
    until("submission", || fixture.held.waiting() >= 2 * 50 + 25).await;
    let held = fixture.held.take();
    std::thread::spawn(move || {
        let mut batch = ReplyBatch::new();
        for (request, reply) in held {
            assert!(matches!(request, Request::WriteZeroes { .. }));
            batch.ok(reply);
        }
    })
    .join()
    .unwrap();
    for (index, raw) in raws.iter_mut().enumerate() {
        for round in 0..50u64 {
            assert_eq!(raw.simple().await, (0, round * 10 + index as u64));
        }
        raw.assert_silent();
    }
}
