//! Random operations through our client and our server, against plain bytes.

use std::sync::Arc;

use bytes::Bytes;
use srn_nbd::client::{Client, ConnectOptions, ZeroOptions};

use crate::support::backend::pattern;
use crate::support::{Fixture, Random, SIZE, uri, within};

/// Regions used by one task each, in bytes.
const REGION: u64 = 8 << 20;

/// Sizes of requests up to this many bytes, which covers every way a payload may take.
const LARGEST: u64 = 1 << 20;

fn check(flavor: &mut tokio::runtime::Builder, export: &'static str, structured: bool) {
    let random = Random::new(&format!("model of {export}, structured {structured}"));
    let runtime = flavor.enable_all().build().unwrap();
    runtime.block_on(check_with(random, export, structured));
}

async fn check_with(mut random: Random, export: &str, structured: bool) {
    let fixture = Fixture::start().await;
    let options = ConnectOptions { structured, ..ConnectOptions::default() };
    let tcp = fixture.client_with(export, &options).await;
    let unix = Client::connect(&uri(&fixture.unix_uri(export)), &options).await.unwrap();
    let before = random.below(u64::MAX);
    // Two connections, several tasks on each, a region for each task.
    let mut tasks = Vec::new();
    for region in 0..(SIZE / REGION) {
        let client = if region % 2 == 0 { tcp.clone() } else { unix.clone() };
        let start = region * REGION;
        let mut content = vec![0; REGION as usize];
        if random.chance(2) {
            content.copy_from_slice(&pattern(before, start, REGION as usize));
            fixture.memory.fill(start, &content);
        }
        let task = Task { client, random: random.fork(), start, content };
        tasks.push(tokio::spawn(task.run(80)));
    }
    let mut expected = Vec::new();
    for task in tasks {
        expected.extend(within("operations", task).await.unwrap());
    }
    assert!(fixture.memory.contents(0, SIZE as usize) == expected, "memory differs");
    // All of it once more, in large reads at the same time.
    let expected = Bytes::from(expected);
    let reads = (0..SIZE / LARGEST).map(|index| {
        let (client, expected) = (tcp.clone(), expected.clone());
        let start = index * LARGEST;
        tokio::spawn(async move {
            let data = client.read(start, LARGEST as u32).await.unwrap();
            assert!(data == expected[start as usize..][..LARGEST as usize], "at {start}");
        })
    });
    for read in reads.collect::<Vec<_>>() {
        within("reading", read).await.unwrap();
    }
    tcp.disconnect().await.unwrap();
    drop(unix);
    crate::support::until("closing", || fixture.closed() == 2).await;
    assert_eq!(fixture.opened(), 2);
}

struct Task {
    client: Client,
    random: Random,
    start: u64,
    content: Vec<u8>,
}

impl Task {
    async fn run(mut self, rounds: u32) -> Vec<u8> {
        for round in 0..rounds {
            let (from, length) = self.range();
            let at = self.start + from as u64;
            match self.random.below(10) {
                0..4 => self.write(from, length, u64::from(round)).await,
                4 => {
                    let options = ZeroOptions {
                        no_hole: self.random.chance(2),
                        fast: self.random.chance(4),
                        fua: self.random.chance(2),
                    };
                    self.client.write_zeroes(at, length as u32, options).await.unwrap();
                    self.content[from..from + length].fill(0);
                }
                5 => {
                    // Trimmed memory reads as zeroes here, though no client may rely on it.
                    self.client.trim(at, length as u32, false).await.unwrap();
                    self.content[from..from + length].fill(0);
                }
                6 => self.client.flush().await.unwrap(),
                7 if self.client.structured() => self.status(from, length).await,
                _ => {
                    let data = self.client.read(at, length as u32).await.unwrap();
                    assert!(data == self.content[from..from + length], "read {length} at {at}");
                }
            }
        }
        self.content
    }

    fn range(&mut self) -> (usize, usize) {
        let sectors = match self.random.below(4) {
            0 => 1,
            1 => 8,
            2 => 1 + self.random.below(300),
            _ => 1 + self.random.below(LARGEST / 512),
        };
        let length = sectors * 512;
        let from = self.random.below((REGION - length) / 512 + 1) * 512;
        (from as usize, length as usize)
    }

    async fn write(&mut self, from: usize, length: usize, round: u64) {
        let at = self.start + from as u64;
        let data = pattern(self.random.next() ^ round, at, length);
        self.content[from..from + length].copy_from_slice(&data);
        self.client.write(at, data, self.random.chance(4)).await.unwrap();
    }

    /// Whatever is told to be zero must be so.
    async fn status(&mut self, from: usize, length: usize) {
        let at = self.start + from as u64;
        let extents = self.client.allocation(at, length as u32).await.unwrap();
        let mut position = from;
        for extent in extents {
            let end = (position + extent.length as usize).min(from + length);
            if extent.zero {
                let zero = self.content[position..end].iter().all(|byte| *byte == 0);
                assert!(zero, "told to be zero: {position}..{end} of the region at {at}");
            }
            position = end;
        }
        assert_eq!(position, from + length, "this server tells everything");
    }
}

#[test]
fn inline_structured_on_two_threads() {
    check(tokio::runtime::Builder::new_multi_thread().worker_threads(2), "disk", true);
}

#[test]
fn inline_simple_on_one_thread() {
    check(&mut tokio::runtime::Builder::new_current_thread(), "disk", false);
}

#[test]
fn threaded_structured_on_one_thread() {
    check(&mut tokio::runtime::Builder::new_current_thread(), "threaded", true);
}

#[test]
fn threaded_simple_on_two_threads() {
    check(tokio::runtime::Builder::new_multi_thread().worker_threads(2), "threaded", false);
}

/// Many small writes in flight on one connection arrive whole, whoever answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_writes_in_flight() {
    for export in ["disk", "threaded"] {
        let fixture = Fixture::start().await;
        let client = fixture.client(export).await;
        let tasks: Vec<_> = (0..64u64)
            .map(|lane| {
                let client = client.clone();
                tokio::spawn(async move {
                    for round in 0..100 {
                        let at = (round * 64 + lane) * 4096;
                        client.write(at, pattern(7, at, 4096), false).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            within("writing", task).await.unwrap();
        }
        let length = 64 * 100 * 4096;
        assert!(fixture.memory.contents(0, length) == pattern(7, 0, length), "{export}");
        let status = &fixture.server.connections()[0];
        assert_eq!((status.requests, status.bytes_written), (6400, length as u64));
        assert_eq!(status.export.as_deref(), Some(export));
        drop(client);
        let memory: Arc<_> = Arc::clone(&fixture.memory);
        assert_eq!(memory.flushes(), 0);
    }
}
