//! Two real stores and the real sender and receiver machines over a simulated link: cuts, delays,
//! crashes and failing disks at both ends, and failovers, against an oracle of every frame.
//!
//! What is checked after each step:
//! * P1 at the far end: a frame that was acknowledged survives any crash of the secondary;
//! * P2: the secondary's disks are exactly the result of the primary's frames up to its head;
//! * P4: after a failover the old primary is fenced and appends nothing;
//! * P6: only frames that are durable at the primary are ever sent;
//! * P7: what a reconnection sends again is at most what was not acknowledged;
//! * and when the faults end, both nodes come to hold the same.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use srn_core::frame::envelope;
use srn_core::ids::{EpochId, FrameHash, GroupId, Seq};
use srn_core::receiver::{Answer, Receiver};
use srn_core::sender::{Phase, Sender, Stop};
use srn_core::state::Cause;
use srn_core::time::{Mono, Now, WallTime};
use srn_core::wire::{Accept, Message, Offer, Refuse, RefuseCode, StreamHeader};
use srn_store::StoreError;
use srn_store::codec::{Codecs, Effort};
use srn_store::frame::Frame;
use srn_store::group::{Appender, Change, Cursor, Group, NewGroup, Options, Retention};
use srn_store::io::BufPool;
use srn_store::manifest::{Fence, Keep, Role};

use crate::oracle::{self, History, Write, contents};
use crate::seeds::{Coverage, Simulation};
use crate::{Chance, Fault, SimDisk};

const DISKS: u32 = 2;
const SECTORS: u64 = 320;
const WINDOW: u64 = 256 * 1024;
const GROUP: GroupId = GroupId([1; 16]);

fn now(clock: u64) -> Now {
    Now { mono: Mono(clock), wall: WallTime(1_700_000_000_000_000 + clock as i64) }
}

/// What travels: control messages both ways, and frames one way, each in order.
#[derive(Debug)]
enum Packet {
    Control(Vec<u8>),
    StreamBegin(Vec<u8>),
    Frame { fixed: [u8; envelope::LEN], front: Bytes, content: Bytes },
}

struct Node {
    disk: SimDisk,
    options: Options,
    group: Arc<Group>,
    appender: Option<Appender>,
    /// Memory that outlives a restart, to be quick.
    pool: BufPool,
}

impl Node {
    fn open(&mut self, chance: &mut Chance, clock: u64) {
        self.appender = None;
        self.disk.no_fault();
        self.disk = if self.disk.is_off() || chance.percent(50) {
            self.disk.power_cycle()
        } else {
            self.disk.process_restart()
        };
        let shared = oracle::shared_with(&self.disk, chance.any(), &self.pool);
        let opened = Group::open(&shared, self.options, Path::new("/g"), now(clock))
            .expect("opening after a crash");
        self.group = opened.group;
        self.appender = Some(opened.main);
    }
}

struct World {
    chance: Chance,
    clock: u64,
    primary: Node,
    secondary: Node,
    sender: Sender,
    receiver: Receiver,
    cursor: Option<Cursor>,
    waiting: Vec<(Arc<Frame>, u64)>,
    to_secondary: VecDeque<Packet>,
    to_primary: VecDeque<Packet>,
    up: bool,
    nonce: u64,
    /// The hash of every frame that was durable at the primary, and how many writes there are up to
    /// it.
    truth: BTreeMap<Seq, (FrameHash, usize)>,
    writes: History,
    /// What was handed to the primary and is not known to be durable.
    submitted: VecDeque<Write>,
    acked: Seq,
    failed_over: bool,
    sent_again: u64,
    highest_sent: Seq,
    codecs: Codecs,
    pool: BufPool,
    coverage: Coverage,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let mut node = |salt: u64, role, keep| {
            let disk = SimDisk::new(seed ^ salt, 4 << 30);
            let options = Options {
                segment_bytes: 416 * 1024,
                table_entries_max: chance.between(4, 60) as usize,
                fill: false,
                ..Options::default()
            };
            let new = NewGroup {
                group: GROUP,
                name: "sim".into(),
                role,
                keep,
                epoch: EpochId([1; 16]),
                now: now(0),
            };
            let pool = BufPool::new(8 << 20);
            let shared = oracle::shared_with(&disk, seed ^ salt, &pool);
            let opened = Group::create(&shared, options, Path::new("/g"), &new).expect("create");
            Node { disk, options, group: opened.group, appender: Some(opened.main), pool }
        };
        let keep = if seed.is_multiple_of(2) { Keep::Cache } else { Keep::Replica };
        let primary = node(1, Role::Primary, keep);
        let secondary = node(2, Role::Secondary, Keep::Replica);
        let sender = Sender::new(primary.group.epochs(), Seq(0), Seq(0));
        let receiver = Receiver::new(GROUP, secondary.group.epochs(), secondary.group.head());
        let mut world = Self {
            chance,
            clock: 0,
            primary,
            secondary,
            sender,
            receiver,
            cursor: None,
            waiting: Vec::new(),
            to_secondary: VecDeque::new(),
            to_primary: VecDeque::new(),
            up: false,
            nonce: 0,
            truth: BTreeMap::new(),
            writes: History::new(DISKS, SECTORS),
            submitted: VecDeque::new(),
            acked: Seq(0),
            failed_over: false,
            sent_again: 0,
            highest_sent: Seq(0),
            codecs: Codecs::new(),
            pool: BufPool::new(1 << 20),
            coverage: Coverage::new(),
        };
        world.write((0..DISKS).map(|no| Write::add_disk(no, SECTORS)).collect());
        world
    }

    fn saw(&mut self, what: &'static str) {
        *self.coverage.entry(what).or_default() += 1;
    }

    /// Learns which frames are durable at the primary.
    fn learn(&mut self) {
        let from = self.truth.last_key_value().map_or(Seq(1), |(seq, _)| seq.next());
        let mut cursor = self.primary.group.cursor(from);
        while let Some(frame) = cursor.next().expect("reading the primary's log") {
            let header = frame.header();
            for write in Write::of_frame(&frame, &mut self.codecs) {
                assert_eq!(self.submitted.pop_front().as_ref(), Some(&write), "in the order given");
                self.writes.extend([write]);
            }
            self.truth.insert(header.seq, (frame.position().hash, self.writes.len()));
        }
        self.sender.on_durable(self.primary.group.head().seq);
    }

    fn write(&mut self, writes: Vec<Write>) {
        let changes: Vec<Change> = writes.iter().map(Write::change).collect();
        self.clock += 1000;
        let Some(appender) = &mut self.primary.appender else { return };
        self.submitted.extend(writes);
        match appender.commit(&changes, now(self.clock)) {
            Ok(done) => {
                self.submitted.truncate(done.changes);
                self.learn();
                assert_eq!(self.submitted, [], "answered and not in the log");
            }
            Err(StoreError::Full(_)) => {
                self.submitted.clear();
                self.saw("primary's log full");
            }
            Err(_) => self.crash_primary(),
        }
    }

    fn cut(&mut self) {
        self.up = false;
        self.to_primary.clear();
        self.to_secondary.clear();
        self.sender.on_link_down();
        self.receiver.on_link_down();
        // Frames that were taken in but are not durable: some shells commit them, some drop them.
        if self.chance.percent(50) {
            self.commit_waiting();
        }
        self.waiting.clear();
        self.cursor = None;
    }

    fn crash_primary(&mut self) {
        self.saw("primary crashed");
        self.cut();
        self.clock += 1_000_000;
        self.primary.open(&mut self.chance, self.clock);
        let head = self.primary.group.head();
        let last = self.truth.last_key_value().map_or(Seq(0), |(seq, _)| *seq);
        assert!(head.seq >= last, "the primary lost answered frames: {} of {last}", head.seq);
        self.sender =
            Sender::new(self.primary.group.epochs(), head.seq, self.primary.group.acked());
        self.learn();
        // What is not in the log now was cut.
        self.submitted.clear();
    }

    fn crash_secondary(&mut self) {
        self.saw("secondary crashed");
        self.waiting.clear();
        self.cut();
        self.clock += 1_000_000;
        self.secondary.open(&mut self.chance, self.clock);
        let head = self.secondary.group.head();
        if !self.failed_over {
            assert!(
                head.seq >= self.acked,
                "the secondary lost acknowledged frames: {} of {}",
                head.seq,
                self.acked
            );
            self.receiver = Receiver::new(GROUP, self.secondary.group.epochs(), head);
            self.check_secondary();
        }
    }

    /// P2: the secondary holds a prefix of the primary's history.
    fn check_secondary(&mut self) {
        let head = self.secondary.group.head();
        if head.seq == Seq(0) {
            return;
        }
        let (hash, count) = *self.truth.get(&head.seq).expect("a frame that the primary never had");
        assert_eq!(hash, head.hash);
        let view = self.secondary.group.view_head().expect("view");
        let found = contents(&view, DISKS, SECTORS).expect("reading the secondary");
        self.writes.check(count, &found, format_args!("the secondary's frame {}", head.seq));
    }

    fn connect(&mut self) {
        self.up = true;
        self.nonce += 1;
        self.sender.on_link_up(self.nonce);
        let group = &self.primary.group;
        let offer = Offer {
            group: GROUP,
            name: "sim".parse().expect("name"),
            nonce: self.nonce,
            epochs: group.epochs(),
            head: group.head(),
            oldest: group.oldest(),
            disks: Vec::new(),
        };
        self.send(true, &Message::Offer(offer));
        self.saw("connected");
    }

    fn send(&mut self, to_secondary: bool, message: &Message) {
        let packet = Packet::Control(message.encode());
        if to_secondary {
            self.to_secondary.push_back(packet);
        } else {
            self.to_primary.push_back(packet);
        }
    }

    /// The primary sends what it may.
    fn pump(&mut self) {
        for _ in 0..self.chance.between(1, 6) {
            let Some(seq) = self.sender.next_to_send() else { return };
            assert!(self.truth.contains_key(&seq), "frame {seq} is not durable");
            let group = self.primary.group.clone();
            let cursor = self.cursor.get_or_insert_with(|| group.cursor(seq));
            assert_eq!(cursor.position(), seq);
            let frame = match cursor.next() {
                Ok(frame) => frame.expect("a durable frame"),
                Err(_) if self.primary.disk.is_off() => return,
                Err(error) => panic!("frame {seq} cannot be read: {error}"),
            };
            let effort = *self.chance.pick(&[Effort::None, Effort::Lz4, Effort::Zstd(1)]);
            let frame = frame.encoded(effort, &mut self.codecs, &self.pool);
            if seq <= self.highest_sent {
                self.sent_again += 1;
                assert!(seq > self.acked, "frame {seq} was acknowledged and is sent again");
            }
            self.highest_sent = self.highest_sent.max(seq);
            let mut content = Vec::new();
            frame.content().iter().for_each(|piece| content.extend_from_slice(piece));
            self.to_secondary.push_back(Packet::Frame {
                fixed: frame.envelope().encode(frame.table()),
                front: frame.front().clone(),
                content: content.into(),
            });
            self.sender.on_sent(seq, frame.envelope().wire_len() as u64);
        }
    }

    fn deliver_to_secondary(&mut self) {
        let Some(packet) = self.to_secondary.pop_front() else { return };
        match packet {
            Packet::Control(bytes) => {
                let message = Message::decode(&bytes[4..]).expect("message");
                let Message::Offer(offer) = message else { panic!("unexpected {message:?}") };
                self.on_offer(&offer);
            }
            Packet::StreamBegin(bytes) => {
                let header: [u8; StreamHeader::LEN] = bytes.try_into().expect("header");
                let header = StreamHeader::decode(&header).expect("header");
                self.receiver.on_stream(header.nonce, header.first).expect("stream");
            }
            Packet::Frame { fixed, front, content } => {
                let frame = Frame::from_copy(&fixed, front, content).expect("frame");
                frame.verify(&mut self.codecs).expect("content");
                let bytes = frame.envelope().wire_len() as u64;
                self.receiver
                    .on_frame(frame.header(), frame.position().hash, bytes)
                    .expect("the primary sends what is agreed");
                self.waiting.push((Arc::new(frame), bytes));
            }
        }
    }

    fn on_offer(&mut self, offer: &Offer) {
        if self.failed_over {
            let epochs = self.secondary.group.epochs();
            assert!(offer.epochs.is_superseded_by(&epochs));
            let refuse = Refuse {
                group: GROUP,
                code: RefuseCode::Fenced,
                text: "gone on".into(),
                epochs: Some(epochs),
            };
            return self.send(false, &Message::Refuse(refuse));
        }
        // What was taken in from an earlier stream is durable or dropped by now.
        assert!(self.waiting.is_empty());
        match self.receiver.on_offer(offer, WINDOW) {
            Answer::Accept { position, credit } => {
                let accept = Accept { group: GROUP, nonce: offer.nonce, position, credit };
                self.send(false, &Message::Accept(accept));
            }
            Answer::Refuse(code) => panic!("refused with {code:?}"),
        }
    }

    fn deliver_to_primary(&mut self) {
        let Some(Packet::Control(bytes)) = self.to_primary.pop_front() else { return };
        match Message::decode(&bytes[4..]).expect("message") {
            Message::Accept(accept) => {
                let group = &self.primary.group;
                let hash = match group.hash_at(accept.position.seq) {
                    Ok(hash) => hash,
                    Err(_) if self.primary.disk.is_off() => return,
                    Err(error) => panic!("no hash: {error}"),
                };
                let oldest = group.oldest();
                self.sender
                    .on_accept(accept.nonce, &accept.position, accept.credit, hash, oldest)
                    .expect("accept");
                match self.sender.phase() {
                    Phase::Streaming(stream) => {
                        let header =
                            StreamHeader { group: GROUP, nonce: stream.nonce, first: stream.next };
                        self.cursor = None;
                        self.to_secondary.push_back(Packet::StreamBegin(header.encode()));
                        self.primary.group.set_acked(self.sender.acked());
                        self.saw("streaming");
                    }
                    other => panic!("cannot resume: {other:?}"),
                }
            }
            Message::Ack { seq, .. } => {
                assert!(seq <= self.acked, "acknowledged before it was durable");
                self.sender.on_ack(seq).expect("ack");
                self.primary.group.set_acked(self.sender.acked());
            }
            Message::Credit { limit, .. } => self.sender.on_credit(limit).expect("credit"),
            Message::Refuse(refuse) => {
                assert!(self.sender.on_refuse(refuse.code, refuse.epochs.as_ref()));
                let fence = Fence {
                    cause: Cause::FailoverAtPeer,
                    epochs: refuse.epochs,
                    since: WallTime(0),
                };
                if self.primary.group.set_fence(Some(fence)).is_ok() {
                    self.saw("old primary fenced");
                    assert_eq!(*self.sender.phase(), Phase::Stopped(Stop::Fenced));
                }
            }
            other => panic!("unexpected {other:?}"),
        }
    }

    /// The secondary makes some of what it took in durable, and says so.
    fn commit_waiting(&mut self) {
        if self.waiting.is_empty() || self.failed_over {
            return;
        }
        let count = self.chance.between(1, self.waiting.len() as u64) as usize;
        let some: Vec<(Arc<Frame>, u64)> = self.waiting.drain(..count).collect();
        let frames: Vec<Arc<Frame>> = some.iter().map(|(frame, _)| frame.clone()).collect();
        let Some(appender) = &mut self.secondary.appender else { return };
        match appender.commit_frames(&frames) {
            Ok(done) => {
                assert_eq!(done.frames, frames.len(), "there is no cap");
                let bytes = some.iter().map(|(_, bytes)| bytes).sum();
                let durable = self.receiver.on_durable(done.head, bytes);
                self.acked = done.head.seq;
                if let Some(seq) = durable.ack {
                    self.send(false, &Message::Ack { group: GROUP, seq });
                }
                if let Some(limit) = durable.credit {
                    self.saw("credit granted");
                    self.send(false, &Message::Credit { group: GROUP, limit });
                }
                if self.chance.percent(20) {
                    self.check_secondary();
                }
            }
            Err(StoreError::Full(_)) => panic!("there is room"),
            Err(_) => self.crash_secondary(),
        }
    }

    fn maintain(&mut self) {
        for secondary in [false, true] {
            let (node, floor) = if secondary {
                let head = self.secondary.group.head().seq;
                let from = self.chance.between(0, head.0);
                (&self.secondary, Seq(from))
            } else {
                (&self.primary, self.sender.acked())
            };
            if node.group.maintain(&Retention::from(floor)).is_err() {
                if secondary {
                    self.crash_secondary();
                } else {
                    self.crash_primary();
                }
            }
        }
    }

    fn fail_over(&mut self) {
        if self.failed_over || self.secondary.group.head().seq == Seq(0) {
            return;
        }
        self.cut();
        self.waiting.clear();
        self.secondary.appender = None;
        self.clock += 1000;
        let head = self.secondary.group.head();
        match self.secondary.group.fail_over(EpochId([9; 16]), head.seq, now(self.clock)) {
            Ok(appender) => {
                self.secondary.appender = Some(appender);
                self.failed_over = true;
                self.saw("failed over");
            }
            Err(_) => {
                self.secondary.open(&mut self.chance, self.clock);
                self.failed_over = self.secondary.group.epochs().contains(EpochId([9; 16]));
                if !self.failed_over {
                    let group = &self.secondary.group;
                    self.receiver = Receiver::new(GROUP, group.epochs(), group.head());
                }
            }
        }
    }

    fn step(&mut self) {
        if self.chance.percent(4) {
            let at = self.chance.between(1, 40);
            let fault = if self.chance.percent(65) { Fault::PowerCut } else { Fault::Error };
            let node = if self.chance.percent(50) { &self.primary } else { &self.secondary };
            node.disk.fault_in(at, fault);
        }
        match self.chance.below(100) {
            0..25 => {
                let fenced = self.primary.group.role().1.is_some();
                let writes = Write::some(&mut self.chance, DISKS, SECTORS);
                if !fenced {
                    self.write(writes);
                }
            }
            25..50 if self.up => self.pump(),
            50..70 if self.up => self.deliver_to_secondary(),
            70..80 if self.up => self.deliver_to_primary(),
            80..88 => self.commit_waiting(),
            88..93 => self.maintain(),
            93..95 if self.up => {
                self.saw("link cut");
                self.cut();
            }
            95 => self.crash_primary(),
            96 => self.crash_secondary(),
            97 if self.chance.percent(10) => self.fail_over(),
            _ if !self.up => self.connect(),
            _ => {}
        }
        if self.primary.disk.is_off() {
            self.crash_primary();
        }
        if self.secondary.disk.is_off() {
            self.crash_secondary();
        }
    }

    /// No more faults: everything must come to rest.
    fn settle(&mut self) {
        self.primary.disk.no_fault();
        self.secondary.disk.no_fault();
        self.crash_secondary();
        self.crash_primary();
        self.connect();
        for _ in 0..100_000 {
            self.pump();
            self.deliver_to_secondary();
            self.deliver_to_primary();
            self.commit_waiting();
            let idle = self.to_primary.is_empty()
                && self.to_secondary.is_empty()
                && self.waiting.is_empty()
                && self.sender.next_to_send().is_none();
            if idle {
                break;
            }
        }
        if self.failed_over {
            assert!(self.primary.group.role().1.is_some(), "the old primary is fenced");
            return self.saw("ended fenced");
        }
        assert_eq!(self.secondary.group.head(), self.primary.group.head());
        assert_eq!(self.sender.acked(), self.primary.group.head().seq);
        self.check_secondary();
        self.saw("ended in step");
    }
}

fn run(seed: u64) -> Coverage {
    let mut world = World::new(seed);
    for _ in 0..world.chance.between(200, 900) {
        world.step();
    }
    world.settle();
    if world.sent_again > 0 {
        world.saw("frames sent again after a cut");
    }
    world.coverage
}

const WANTED: &[&str] = &[
    "connected",
    "credit granted",
    "ended fenced",
    "ended in step",
    "failed over",
    "frames sent again after a cut",
    "link cut",
    "old primary fenced",
    "primary crashed",
    "secondary crashed",
];

/// This simulation.
pub const SIMULATION: Simulation = Simulation { name: "pair", run, wanted: WANTED };
