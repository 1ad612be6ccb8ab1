//! Two real stores whose roles change: failovers forced while the other node still writes, the old
//! primary turned round to follow, crashes and failing disks in the middle of all that, and nodes that
//! are set back to an old image of their disk; against an oracle of every frame that was ever written.
//!
//! What is checked:
//! * P4: every frame that was answered lies in the main line of a node or in a branch that is listed,
//!   until a person gives it up (sets a node back, deletes a branch);
//! * P2: what a line shows is exactly the result of the frames that lead to its end;
//! * what is sent after a reversal begins at the fork: the frames before it never go again;
//! * a fenced node appends nothing;
//! * where no node was ever set back, both come to hold the same in the end; where one was, they do, or
//!   the primary names why not.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use srn_core::course::Course;
use srn_core::epoch::{EpochTable, Position};
use srn_core::frame::envelope;
use srn_core::ids::{EpochId, FrameHash, GroupId, Seq};
use srn_core::receiver::{Answer, Receiver};
use srn_core::sender::{Here, Phase, Sender, Stop};
use srn_core::state::Cause;
use srn_core::time::{Mono, Now, WallTime};
use srn_core::wire::{Accept, Message, Offer, Refuse, RefuseCode, StreamHeader};
use srn_store::StoreError;
use srn_store::codec::Codecs;
use srn_store::frame::Frame;
use srn_store::group::{Appender, Change, Cursor, Group, NewGroup, Options, Retention};
use srn_store::manifest::{Fence, Keep, Role};

use crate::oracle::{self, Model, Write, contents};
use crate::seeds::{Coverage, Simulation};
use crate::{Chance, Fault, SimDisk};

const DISKS: u32 = 2;
const SECTORS: u64 = 200;
const WINDOW: u64 = 256 * 1024;
const GROUP: GroupId = GroupId([1; 16]);

fn now(clock: u64) -> Now {
    Now { mono: Mono(clock), wall: WallTime(1_700_000_000_000_000 + clock as i64) }
}

/// What travels to a node, in order.
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
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    cursor: Option<Cursor>,
    waiting: Vec<(Arc<Frame>, u64)>,
    inbox: VecDeque<Packet>,
    /// The newest frame whose content the oracle knows.
    learned: Seq,
    /// What it has said to be durable since its peer asked.
    acked: Seq,
    /// The line of a peer that is primary too.
    rival: Option<EpochTable>,
    /// An older state of its disk.
    image: Option<SimDisk>,
}

impl Node {
    fn fence(&self) -> Option<Fence> {
        self.group.role().1
    }

    fn is_writable(&self) -> bool {
        self.group.role() == (Role::Primary, None)
    }

    fn peer_took_over(&self) -> Option<EpochTable> {
        let fence = self.fence().filter(|fence| fence.cause == Cause::FailoverAtPeer)?;
        fence.epochs
    }
}

/// A frame that was durable at a primary.
struct Known {
    seq: Seq,
    before: FrameHash,
    writes: Vec<Write>,
}

struct World {
    chance: Chance,
    clock: u64,
    nodes: [Node; 2],
    up: bool,
    nonce: u64,
    epochs: u8,
    truth: BTreeMap<FrameHash, Known>,
    /// What persons have given up.
    given_up: BTreeSet<FrameHash>,
    set_back: bool,
    /// Machines are set back in this run.
    wild: bool,
    codecs: Codecs,
    coverage: Coverage,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let mut node = |salt: u64, role| {
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
                keep: Keep::Replica,
                epoch: EpochId::new(1, [1; 16]),
                now: now(0),
            };
            let shared = oracle::shared(&disk, seed ^ salt);
            let opened = Group::create(&shared, options, Path::new("/g"), &new).expect("create");
            Node {
                disk,
                options,
                group: opened.group,
                appender: Some(opened.main),
                sender: None,
                receiver: None,
                cursor: None,
                waiting: Vec::new(),
                inbox: VecDeque::new(),
                learned: Seq(0),
                acked: Seq(0),
                rival: None,
                image: None,
            }
        };
        let nodes = [node(1, Role::Primary), node(2, Role::Secondary)];
        let mut world = Self {
            chance,
            clock: 0,
            nodes,
            up: false,
            nonce: 0,
            epochs: 1,
            truth: BTreeMap::new(),
            given_up: BTreeSet::new(),
            set_back: false,
            wild: seed.is_multiple_of(2),
            codecs: Codecs::new(),
            coverage: Coverage::new(),
        };
        world.write(0, &(0..DISKS).map(|no| Write::add_disk(no, SECTORS)).collect::<Vec<_>>());
        world
    }

    fn saw(&mut self, what: &'static str) {
        *self.coverage.entry(what).or_default() += 1;
    }

    fn tick(&mut self) -> Now {
        self.clock += 1000;
        now(self.clock)
    }

    fn either(&mut self) -> usize {
        self.chance.below(2) as usize
    }

    /// Learns which frames are durable at a primary.
    fn learn(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let head = node.group.head().seq;
        if node.learned < head && !node.disk.is_off() {
            let mut cursor = node.group.cursor(node.learned.next());
            while let Some(frame) = cursor.next().expect("reading a primary's log") {
                let header = frame.header();
                let writes = Write::of_frame(&frame, &mut self.codecs);
                let known = Known { seq: header.seq, before: header.prev, writes };
                self.truth.entry(frame.position().hash).or_insert(known);
            }
            node.learned = head;
        }
        if let Some(sender) = &mut node.sender {
            sender.on_durable(head);
        }
    }

    fn write(&mut self, at: usize, writes: &[Write]) {
        let changes: Vec<Change> = writes.iter().map(Write::change).collect();
        let now = self.tick();
        let Some(appender) = &mut self.nodes[at].appender else { return };
        match appender.commit(&changes, now) {
            Ok(_) => self.learn(at),
            Err(_) => self.crash(at),
        }
    }

    fn cut(&mut self) {
        self.up = false;
        for at in 0..2 {
            let node = &mut self.nodes[at];
            node.inbox.clear();
            node.sender = None;
            node.cursor = None;
            if self.chance.percent(50) {
                self.commit_waiting(at);
            }
            self.nodes[at].receiver = None;
            self.nodes[at].waiting.clear();
        }
    }

    fn crash(&mut self, at: usize) {
        self.saw("crashed");
        self.nodes[at].waiting.clear();
        self.cut();
        self.reopen(at);
    }

    fn reopen(&mut self, at: usize) {
        self.clock += 1_000_000;
        let (seed, hard) = (self.chance.any(), self.chance.percent(50));
        let node = &mut self.nodes[at];
        (node.appender, node.receiver, node.cursor, node.sender) = (None, None, None, None);
        node.disk.no_fault();
        let hard = hard || node.disk.is_off();
        node.disk = if hard { node.disk.power_cycle() } else { node.disk.process_restart() };
        let shared = oracle::shared(&node.disk, seed);
        let opened = Group::open(&shared, node.options, Path::new("/g"), now(self.clock))
            .expect("opening after a crash");
        node.group = opened.group;
        node.appender = Some(opened.main);
        let (role, head) = (node.group.role().0, node.group.head());
        assert!(head.seq >= node.acked || self.set_back, "acknowledged frames are lost");
        if role == Role::Primary {
            self.learn(at);
        }
        self.check(at);
        self.check_kept();
    }

    /// The frames that lead to a position, newest first.
    fn chain(&self, to: &Position) -> Vec<FrameHash> {
        let mut found = Vec::new();
        let (mut at, mut expected) = (to.hash, to.seq);
        while expected > Seq(0) {
            let known = self.truth.get(&at).expect("a frame that no primary ever had");
            assert_eq!(known.seq, expected);
            found.push(at);
            (at, expected) = (known.before, expected.prev());
        }
        assert_eq!(at, FrameHash::ORIGIN);
        found
    }

    fn model(&self, to: &Position) -> Model {
        let mut model = Model::blank(DISKS, SECTORS);
        for hash in self.chain(to).iter().rev() {
            self.truth[hash].writes.iter().for_each(|write| model.apply(write));
        }
        model
    }

    /// P2, of the main line and of every branch.
    fn check(&mut self, at: usize) {
        let group = self.nodes[at].group.clone();
        let head = group.head();
        if head.seq == Seq(0) || self.nodes[at].disk.is_off() {
            return;
        }
        let found = contents(&group.view_head().expect("a view"), DISKS, SECTORS).expect("read");
        assert!(found == self.model(&head), "node {at}: not what leads to {head}");
        for branch in group.branches().expect("branches") {
            let seq = Seq(self.chance.between(branch.fork.0 + 1, branch.end.seq.0));
            let view = group.view_branch(branch.id, Some(seq)).expect("a view of a branch");
            let position = view.catalog().at;
            assert_eq!(position.seq, seq);
            let found = contents(&view, DISKS, SECTORS).expect("reading a branch");
            assert!(found == self.model(&position), "node {at}: not what leads to {position}");
            let end = group.view_branch(branch.id, None).expect("its end").catalog().at;
            assert_eq!(end, branch.end);
            self.saw("branch read");
        }
    }

    /// Every frame that leads to what a node holds.
    fn held(&self) -> BTreeSet<FrameHash> {
        let mut held = BTreeSet::new();
        for node in &self.nodes {
            let branches = node.group.branches().expect("branches");
            let ends = branches.iter().map(|branch| branch.end).chain([node.group.head()]);
            for end in ends {
                held.extend(self.chain(&end));
            }
        }
        held
    }

    /// P4: nothing that was answered is gone.
    fn check_kept(&self) {
        if self.nodes.iter().any(|node| node.disk.is_off()) {
            // Looked at when it is on again.
            return;
        }
        let held = self.held();
        for (hash, known) in &self.truth {
            assert!(
                held.contains(hash) || self.given_up.contains(hash),
                "frame {} is in no line and in no branch any more",
                known.seq
            );
        }
    }

    fn give_up_what_is_gone(&mut self) {
        let held = self.held();
        let gone = self.truth.keys().filter(|hash| !held.contains(*hash)).copied();
        self.given_up.extend(gone.collect::<Vec<_>>());
    }

    fn connect(&mut self) {
        self.up = true;
        self.saw("connected");
        for at in 0..2 {
            self.offer(at);
        }
    }

    fn offer(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        if node.group.role().0 != Role::Primary || node.peer_took_over().is_some() {
            return;
        }
        self.nonce += 1;
        let (epochs, head) = (node.group.epochs(), node.group.head());
        let mut sender = Sender::new(epochs.clone(), head.seq, node.group.acked());
        sender.on_link_up(self.nonce);
        node.sender = Some(sender);
        node.cursor = None;
        let (group, name, nonce) = (GROUP, "sim".parse().expect("name"), self.nonce);
        let (oldest, disks) = (node.group.oldest(), Vec::new());
        let offer = Offer { group, name, nonce, epochs, head, oldest, has_copy: false, disks };
        self.say(1 - at, &Message::Offer(offer));
    }

    fn say(&mut self, to: usize, message: &Message) {
        self.nodes[to].inbox.push_back(Packet::Control(message.encode()));
    }

    fn refuse(&mut self, at: usize, code: RefuseCode) {
        let epochs = Some(self.nodes[at].group.epochs());
        let refuse = Refuse { group: GROUP, code, text: "no".into(), epochs };
        self.say(1 - at, &Message::Refuse(refuse));
    }

    /// A primary sends what it may.
    fn pump(&mut self, at: usize) {
        for _ in 0..self.chance.between(1, 6) {
            let node = &mut self.nodes[at];
            let Some(sender) = &mut node.sender else { return };
            let Some(seq) = sender.next_to_send() else { return };
            let group = node.group.clone();
            let cursor = node.cursor.get_or_insert_with(|| group.cursor(seq));
            assert_eq!(cursor.position(), seq);
            let frame = match cursor.next() {
                Ok(frame) => frame.expect("a durable frame"),
                Err(_) if node.disk.is_off() => return,
                Err(error) => panic!("frame {seq} cannot be read: {error}"),
            };
            let content: Vec<u8> =
                frame.content().iter().flat_map(|piece| piece.to_vec()).collect();
            sender.on_sent(seq, frame.envelope().wire_len() as u64);
            let packet = Packet::Frame {
                fixed: frame.envelope().encode(frame.table()),
                front: frame.front().clone(),
                content: content.into(),
            };
            let to = &mut self.nodes[1 - at];
            // Nothing that the peer has goes again: after a reversal only what is behind the fork.
            assert!(seq > to.acked, "frame {seq} is held by the peer and is sent again");
            to.inbox.push_back(packet);
        }
    }

    fn deliver(&mut self, at: usize) {
        let Some(packet) = self.nodes[at].inbox.pop_front() else { return };
        match packet {
            Packet::Control(bytes) => match Message::decode(&bytes[4..]).expect("message") {
                Message::Offer(offer) => self.on_offer(at, &offer),
                Message::Accept(accept) => self.on_accept(at, &accept),
                Message::Refuse(refuse) => self.on_refuse(at, &refuse),
                Message::Hindrance { .. } => self.on_hindrance(at),
                Message::Ack { seq, .. } => {
                    let node = &mut self.nodes[at];
                    if let Some(sender) = &mut node.sender {
                        sender.on_ack(seq).expect("ack");
                        node.group.set_acked(sender.acked());
                    }
                }
                Message::Credit { limit, .. } => {
                    if let Some(sender) = &mut self.nodes[at].sender {
                        sender.on_credit(limit).expect("credit");
                    }
                }
                other => panic!("unexpected {other:?}"),
            },
            Packet::StreamBegin(bytes) => {
                let header: [u8; StreamHeader::LEN] = bytes.try_into().expect("header");
                let header = StreamHeader::decode(&header).expect("header");
                let receiver = self.nodes[at].receiver.as_mut().expect("it has accepted");
                receiver.on_stream(header.nonce, header.first).expect("stream");
            }
            Packet::Frame { fixed, front, content } => {
                let frame = Frame::from_copy(&fixed, front, content).expect("frame");
                frame.verify(&mut self.codecs).expect("content");
                let bytes = frame.envelope().wire_len() as u64;
                let node = &mut self.nodes[at];
                let receiver = node.receiver.as_mut().expect("it has accepted");
                receiver
                    .on_frame(frame.header(), frame.position().hash, bytes)
                    .expect("the primary sends what is agreed");
                node.waiting.push((Arc::new(frame), bytes));
            }
        }
    }

    fn on_offer(&mut self, at: usize, offer: &Offer) {
        let node = &self.nodes[at];
        let ours = node.group.epochs();
        if node.group.role().0 == Role::Primary {
            let superseded = ours.is_superseded_by(&offer.epochs);
            if superseded && node.peer_took_over().is_none() && !self.fence(at, &offer.epochs) {
                return;
            }
            return self.refuse(at, RefuseCode::Fenced);
        }
        assert!(node.waiting.is_empty());
        let course = Course::of(&ours, &node.group.head(), &offer.epochs);
        if let Course::Leave { .. } = course {
            assert!(self.set_back, "a secondary has left the line of its primary by itself");
            if !self.follow(at, &offer.epochs) {
                if self.up {
                    self.refuse(at, RefuseCode::Diverged);
                }
                return;
            }
            self.saw("secondary left its line");
        }
        let node = &mut self.nodes[at];
        let (epochs, head) = (node.group.epochs(), node.group.head());
        let mut receiver = Receiver::new(GROUP, epochs, head);
        let answer = receiver.on_offer(offer, WINDOW);
        node.receiver = Some(receiver);
        match answer {
            Answer::Accept { position, credit } => {
                node.acked = position.seq;
                let accept = Accept {
                    group: GROUP,
                    nonce: offer.nonce,
                    position,
                    credit,
                    compare: false,
                    under: None,
                };
                self.say(1 - at, &Message::Accept(accept));
            }
            Answer::Refuse(code) => {
                assert!(self.set_back, "refused with {code:?}");
                self.refuse(at, code);
            }
        }
    }

    fn on_accept(&mut self, at: usize, accept: &Accept) {
        let node = &mut self.nodes[at];
        let hash = match node.group.hash_at(accept.position.seq) {
            Ok(hash) => hash,
            Err(_) if node.disk.is_off() => return,
            Err(error) => panic!("no hash: {error}"),
        };
        let oldest = node.group.oldest();
        let sender = node.sender.as_mut().expect("it has offered");
        sender.on_accept(accept, Here { hash, oldest, has_copy: false }).expect("accept");
        match sender.phase() {
            Phase::Streaming(stream) => {
                let header = StreamHeader { group: GROUP, nonce: stream.nonce, first: stream.next };
                let acked = sender.acked();
                node.cursor = None;
                if acked < node.group.acked() {
                    assert!(self.set_back, "the peer has lost what it had acknowledged");
                    node.group.set_back_acked(acked);
                }
                node.group.set_acked(acked);
                let back = node.group.epochs().list().len() > 1;
                self.nodes[1 - at].inbox.push_back(Packet::StreamBegin(header.encode()));
                self.saw("streaming");
                if back {
                    self.saw("streaming behind a fork");
                }
            }
            other => {
                assert!(self.set_back, "cannot go on: {other:?}");
                self.saw("stopped, and says why");
            }
        }
    }

    fn on_refuse(&mut self, at: usize, refuse: &Refuse) {
        let Some(sender) = &mut self.nodes[at].sender else { return };
        let theirs = refuse.epochs.as_ref().expect("every refusal here has epochs");
        if sender.on_refuse(refuse.code, Some(theirs)) {
            assert_eq!(*sender.phase(), Phase::Stopped(Stop::Fenced));
            let _ = self.fence(at, theirs);
        } else if refuse.code == RefuseCode::Fenced
            && !theirs.is_superseded_by(&self.nodes[at].group.epochs())
        {
            assert!(self.set_back, "two primaries, and neither is the newer one");
            self.nodes[at].rival = Some(theirs.clone());
            self.saw("two primaries");
        } else if refuse.code == RefuseCode::Ahead {
            self.saw("primary was set back");
        }
    }

    /// A peer can be offered a group again which it refused.
    fn on_hindrance(&mut self, at: usize) {
        let refused = self.nodes[at].sender.as_ref().is_some_and(|sender| {
            matches!(sender.phase(), Phase::Stopped(Stop::Refused(RefuseCode::Fenced)))
        });
        if refused {
            self.offer(at);
        }
    }

    fn fence(&mut self, at: usize, epochs: &EpochTable) -> bool {
        let fence = Fence {
            cause: Cause::FailoverAtPeer,
            epochs: Some(epochs.clone()),
            since: WallTime(0),
        };
        if self.nodes[at].group.set_fence(Some(fence)).is_err() {
            self.crash(at);
            return false;
        }
        self.saw("fenced");
        true
    }

    /// A secondary makes some of what it took in durable, and says so.
    fn commit_waiting(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        if node.waiting.is_empty() || node.group.role().0 == Role::Primary {
            return;
        }
        let count = self.chance.between(1, node.waiting.len() as u64) as usize;
        let some: Vec<(Arc<Frame>, u64)> = node.waiting.drain(..count).collect();
        let frames: Vec<Arc<Frame>> = some.iter().map(|(frame, _)| frame.clone()).collect();
        let (Some(appender), Some(receiver)) = (&mut node.appender, &mut node.receiver) else {
            return;
        };
        let before = node.group.epochs();
        match appender.commit_frames(&frames) {
            Ok(done) => {
                assert_eq!(done.frames, frames.len(), "there is no cap");
                assert_eq!(done.head, node.group.head());
                let bytes = some.iter().map(|(_, bytes)| bytes).sum();
                let durable = receiver.on_durable(done.head, bytes);
                node.acked = done.head.seq;
                let entered = before != node.group.epochs();
                let up = self.up;
                if let Some(seq) = durable.ack.filter(|_| up) {
                    self.say(1 - at, &Message::Ack { group: GROUP, seq });
                }
                if let Some(limit) = durable.credit.filter(|_| up) {
                    self.say(1 - at, &Message::Credit { group: GROUP, limit });
                }
                if entered {
                    self.saw("epoch entered with its first frame");
                }
                if entered || self.chance.percent(10) {
                    self.check(at);
                }
            }
            Err(_) if self.up => self.crash(at),
            // The link was just cut.
            Err(_) => self.reopen(at),
        }
    }

    fn maintain(&mut self, at: usize) {
        let group = self.nodes[at].group.clone();
        let head = group.head().seq;
        let floor = match group.role().0 {
            // What the peer has not got stays; after a failover that is what lies behind the fork.
            Role::Primary if group.acked() == Seq(0) => {
                group.epochs().list().last().map_or(Seq(0), |epoch| epoch.forked_from.seq)
            }
            Role::Primary => group.acked(),
            Role::Secondary => Seq(self.chance.between(0, head.0)),
        };
        if group.maintain(&Retention::from(floor)).is_err() {
            self.crash(at);
        }
    }

    /// A person makes a secondary primary, whatever the other node does.
    fn fail_over(&mut self, at: usize) {
        let head = self.nodes[at].group.head().seq;
        if self.nodes[at].is_writable() || head == Seq(0) {
            return;
        }
        let was_primary = self.nodes[at].group.role().0 == Role::Primary;
        self.cut();
        let group = self.nodes[at].group.clone();
        let mut seq = self.nodes[at].group.head().seq;
        if self.chance.percent(25) && !was_primary {
            let other = Seq(self.chance.between(1, seq.0));
            if group.view_at(other).is_ok_and(|view| view.catalog().disks.len() == 2) {
                seq = other;
            }
        }
        self.nodes[at].appender = None;
        self.epochs += 1;
        let now = self.tick();
        let id = group.next_epoch([self.epochs; 16]);
        match group.fail_over(id, seq, now) {
            Ok(appender) => {
                let node = &mut self.nodes[at];
                node.appender = Some(appender);
                // The frame that begins the epoch is news too.
                node.learned = seq;
                node.acked = Seq(0);
                self.learn(at);
                self.saw("failed over");
            }
            Err(_) => {
                let node = &mut self.nodes[at];
                node.learned = seq;
                node.acked = Seq(0);
                self.crash(at);
            }
        }
        self.check_kept();
    }

    /// A person turns a fenced primary round.
    fn reverse(&mut self, at: usize) {
        let Some(theirs) = self.nodes[at].peer_took_over() else { return };
        if self.follow(at, &theirs) {
            self.saw("turned round");
            self.nodes[at].rival = None;
            if self.up {
                self.say(1 - at, &Message::Hindrance { group: GROUP, text: String::new() });
            }
        }
    }

    /// Whether it follows now.
    fn follow(&mut self, at: usize, theirs: &EpochTable) -> bool {
        let now = self.tick();
        let node = &mut self.nodes[at];
        node.waiting.clear();
        node.appender = None;
        if node.disk.is_off() {
            return false;
        }
        let before = node.group.branches().expect("branches").len();
        match node.group.follow(theirs, now) {
            Ok(appender) => {
                node.appender = Some(appender);
                node.acked = Seq(0);
                node.learned = node.group.head().seq;
                assert_eq!(node.group.role(), (Role::Secondary, None));
                let after = node.group.branches().map_or(before, |branches| branches.len());
                if after > before {
                    self.saw("branch kept");
                }
                self.check(at);
                self.check_kept();
                true
            }
            Err(StoreError::NotInHistory(_)) => {
                // Only where the place is not kept any more, or somebody was set back.
                let course = Course::of(&node.group.epochs(), &node.group.head(), theirs);
                let gone = match course {
                    Course::Leave { at, .. } => node.group.view_at(at.seq).is_err(),
                    _ => false,
                };
                node.appender = Some(node.group.appender(now).expect("the line as it was"));
                assert!(gone || self.set_back, "it cannot follow");
                self.saw("cannot follow, and says why");
                false
            }
            Err(error) => {
                assert!(
                    !matches!(error, StoreError::Invalid(_) | StoreError::Corrupt(_)),
                    "{error}"
                );
                node.acked = Seq(0);
                self.crash(at);
                false
            }
        }
    }

    /// A machine is set back to an older image of its disk.
    fn restore(&mut self, at: usize) {
        let Some(image) = self.nodes[at].image.take() else { return };
        self.set_back = true;
        self.saw("set back");
        self.cut();
        let node = &mut self.nodes[at];
        node.waiting.clear();
        (node.appender, node.acked, node.rival) = (None, Seq(0), None);
        node.disk = image;
        // The oracle cannot know whether what was under way then was answered.
        node.learned = Seq(0);
        self.reopen_image(at);
    }

    fn reopen_image(&mut self, at: usize) {
        self.clock += 1_000_000;
        let seed = self.chance.any();
        let node = &mut self.nodes[at];
        let shared = oracle::shared(&node.disk, seed);
        let opened = Group::open(&shared, node.options, Path::new("/g"), now(self.clock))
            .expect("opening an old image");
        node.group = opened.group;
        node.appender = Some(opened.main);
        node.learned = node.group.oldest().prev();
        if node.group.role().0 == Role::Primary {
            self.learn(at);
        }
        self.give_up_what_is_gone();
        self.check(at);
    }

    fn delete_branch(&mut self, at: usize) {
        if self.nodes.iter().any(|node| node.disk.is_off()) {
            return;
        }
        let branches = self.nodes[at].group.branches().expect("branches");
        if branches.is_empty() {
            return;
        }
        let branch = *self.chance.pick(&branches);
        if self.nodes[at].group.delete_branch(branch.id).is_err() {
            // It is gone or it is there, and a person knows which only afterwards.
            self.given_up.extend(self.chain(&branch.end));
            return self.crash(at);
        }
        if self.nodes[at].disk.is_off() {
            self.given_up.extend(self.chain(&branch.end));
            return;
        }
        self.give_up_what_is_gone();
        self.saw("branch deleted");
        self.check(at);
    }

    fn step(&mut self) {
        if self.chance.percent(4) {
            let operations = self.chance.between(1, 40);
            let fault = if self.chance.percent(65) { Fault::PowerCut } else { Fault::Error };
            let at = self.either();
            self.nodes[at].disk.fault_in(operations, fault);
        }
        let at = self.either();
        match self.chance.below(1000) {
            0..250 => {
                let writes = Write::some(&mut self.chance, DISKS, SECTORS);
                if self.nodes[at].is_writable() {
                    self.write(at, &writes);
                }
            }
            250..480 if self.up => self.pump(at),
            480..740 if self.up => self.deliver(at),
            740..840 => self.commit_waiting(at),
            840..890 => self.maintain(at),
            890..902 if self.up => {
                self.saw("link cut");
                self.cut();
            }
            902..910 => self.crash(at),
            910..920 if self.nodes[at].fence().is_none() => self.fail_over(at),
            920..955 => self.reverse(at),
            955..959 if self.wild => {
                self.nodes[at].image = Some(self.nodes[at].disk.snapshot());
            }
            959..963 if self.wild => self.restore(at),
            963 if self.chance.percent(50) => self.delete_branch(at),
            _ if !self.up => self.connect(),
            _ => {}
        }
        for at in 0..2 {
            if self.nodes[at].disk.is_off() {
                self.crash(at);
            }
        }
    }

    /// Lets everything that is under way come to rest.
    fn rest(&mut self) {
        for _ in 0..100_000 {
            for at in 0..2 {
                self.pump(at);
                self.deliver(at);
                self.commit_waiting(at);
            }
            let idle = self.nodes.iter().all(|node| {
                let sends =
                    node.sender.as_ref().is_some_and(|sender| sender.next_to_send().is_some());
                node.inbox.is_empty() && node.waiting.is_empty() && !sends
            });
            if idle {
                return;
            }
        }
        panic!("it never comes to rest");
    }

    /// No more faults, and a person who does what each state says.
    fn settle(&mut self) {
        for at in 0..2 {
            self.nodes[at].disk.no_fault();
            self.crash(at);
        }
        for _ in 0..4 {
            self.connect();
            self.rest();
            for at in 0..2 {
                self.reverse(at);
            }
            self.rest();
            let roles = [0, 1].map(|at| self.nodes[at].group.role().0);
            let could_not = self.coverage.contains_key("cannot follow, and says why");
            if !self.nodes.iter().any(Node::is_writable) {
                assert!(self.set_back || could_not, "nobody is primary");
                let at = self.either();
                // A node that its peer has fenced is taken back: that peer is not primary any more.
                self.saw(match roles {
                    [Role::Secondary, Role::Secondary] => "two secondaries",
                    _ => "a fenced node is taken back",
                });
                self.fail_over(at);
            } else if roles == [Role::Primary; 2]
                && self.nodes[0].is_writable()
                && let Some(theirs) = self.nodes[0].rival.take()
            {
                // This one gives way.
                assert!(self.fence(0, &theirs));
                self.reverse(0);
            }
            self.cut();
        }
        self.connect();
        self.rest();
        self.check_kept();
        for at in 0..2 {
            self.check(at);
        }
        let heads = [0, 1].map(|at| self.nodes[at].group.head());
        if heads[0] == heads[1] {
            return self.saw("ended in step");
        }
        let could_not = self.coverage.contains_key("cannot follow, and says why");
        assert!(self.set_back || could_not, "{heads:?}");
        let says_why = self.nodes.iter().any(|node| {
            let sender = node.sender.as_ref();
            sender.is_some_and(|sender| matches!(sender.phase(), Phase::Stopped(_)))
        });
        assert!(says_why, "not in step, and nobody says why: {heads:?}");
        self.saw("ended apart, and says why");
    }
}

fn run(seed: u64) -> Coverage {
    let mut world = World::new(seed);
    for _ in 0..world.chance.between(300, 1500) {
        world.step();
    }
    world.settle();
    world.coverage
}

const WANTED: &[&str] = &[
    "a fenced node is taken back",
    "branch deleted",
    "branch kept",
    "branch read",
    "cannot follow, and says why",
    "connected",
    "crashed",
    "ended in step",
    "epoch entered with its first frame",
    "failed over",
    "fenced",
    "primary was set back",
    "secondary left its line",
    "set back",
    "streaming behind a fork",
    "turned round",
    "two primaries",
    "two secondaries",
];

/// This simulation.
pub const SIMULATION: Simulation = Simulation { name: "reversal", run, wanted: WANTED };
