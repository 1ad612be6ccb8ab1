//! What the two nodes say to each other, and what a link does to it.
//!
//! QUIC hides loss, duplication and reordering of packets below its streams. What is left to see:
//! a session ends after any message and at one end before the other, and a later one begins while
//! something of the old one is still on its way.

use std::sync::Arc;

use bytes::Bytes;
use srn_core::epoch::Position;
use srn_core::frame::{Header, envelope};
use srn_core::ids::{EpochId, FrameHash, GroupId};
use srn_core::receiver::Answer;
use srn_core::sender::{Here, Phase, Stop};
use srn_core::state::Cause;
use srn_core::time::WallTime;
use srn_core::wire::{Accept, Message, Offer, Refuse, RefuseCode, StreamHeader};
use srn_store::StoreError;
use srn_store::codec::Effort;
use srn_store::frame::Frame;
use srn_store::manifest::Fence;

use super::carry::Changes;
use super::{GROUP, WINDOW, World};

/// What travels: control messages both ways, and frames one way, each in order.
#[derive(Debug)]
pub(super) enum Packet {
    Control(Vec<u8>),
    StreamBegin(Vec<u8>),
    Frame { fixed: [u8; envelope::LEN], front: Bytes, content: Bytes },
    Changes(Box<Changes>),
}

impl World {
    /// The session is gone. The secondary may not know that yet.
    pub(super) fn cut(&mut self) {
        self.up = false;
        self.half_open = self.chance.percent(30);
        self.to_primary.clear();
        self.sender.on_link_down();
        self.cursor = None;
        if !self.half_open {
            self.end_of_session();
        }
    }

    /// The secondary notices.
    pub(super) fn end_of_session(&mut self) {
        self.half_open = false;
        self.to_secondary.clear();
        self.receiver.on_link_down();
        // Frames that were taken in but are not durable: some shells commit them, some drop them.
        if self.chance.percent(50) {
            self.commit_waiting();
        }
        self.waiting.clear();
    }

    pub(super) fn connect(&mut self) {
        if self.half_open {
            self.saw("new session before the old one was noticed to be gone");
        }
        // Whatever is on its way belongs to the old session.
        self.late.extend(self.to_secondary.drain(..));
        self.to_primary.clear();
        self.up = true;
        self.half_open = false;
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
            has_copy: self.has_copy(),
            disks: Vec::new(),
        };
        self.send(true, &Message::Offer(offer));
        self.saw("connected");
    }

    pub(super) fn send(&mut self, to_secondary: bool, message: &Message) {
        let packet = Packet::Control(message.encode());
        if to_secondary {
            self.to_secondary.push_back(packet);
        } else {
            self.to_primary.push_back(packet);
        }
    }

    /// The primary sends what it may.
    pub(super) fn pump(&mut self) {
        for _ in 0..self.chance.between(1, 6) {
            let Some(seq) = self.sender.next_to_send() else { return };
            assert!(self.ours.frames.contains_key(&seq), "frame {seq} is not durable");
            let group = self.primary.group.clone();
            let cursor = self.cursor.get_or_insert_with(|| group.cursor(seq));
            assert_eq!(cursor.position(), seq);
            let frame = match cursor.next() {
                Ok(frame) => frame.expect("a durable frame"),
                Err(_) if self.primary.disk.is_off() => return,
                // The log gave way: the next offer says how far it goes back.
                Err(StoreError::NotInHistory(_)) if self.has_copy() => return self.cut(),
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

    pub(super) fn deliver_to_secondary(&mut self) {
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
                let old = self.receiver.clone().on_stream(header.nonce - 1, header.first);
                assert!(old.is_err(), "a stream of an old session was taken");
                self.receiver.on_stream(header.nonce, header.first).expect("stream");
                let twice = self.receiver.clone().on_stream(header.nonce, header.first);
                assert!(twice.is_err(), "a stream was begun twice");
            }
            Packet::Frame { fixed, front, content } => {
                let frame = Frame::from_copy(&fixed, front, content).expect("frame");
                frame.verify(&mut self.codecs).expect("content");
                let bytes = frame.envelope().wire_len() as u64;
                if self.chance.percent(20) {
                    self.tamper(frame.header(), bytes);
                }
                self.receiver
                    .on_frame(frame.header(), frame.position().hash, bytes)
                    .expect("the primary sends what is agreed");
                self.waiting.push((Arc::new(frame), bytes));
            }
            Packet::Changes(changes) => self.leap(*changes),
        }
    }

    /// Frames that must never be taken, in place of `right`.
    fn tamper(&mut self, right: &Header, bytes: u64) {
        self.saw("foreign frame refused");
        let other = EpochId([7; 16]);
        for (bad, what) in [
            (Header { seq: right.seq.next(), ..*right }, "after a hole"),
            (Header { seq: right.seq.prev(), ..*right }, "twice"),
            (Header { prev: FrameHash([7; 16]), ..*right }, "behind another frame"),
            (Header { epoch: other, ..*right }, "of another epoch"),
            (Header { group: GroupId([7; 16]), ..*right }, "of another group"),
        ] {
            let taken = self.receiver.clone().on_frame(&bad, FrameHash([8; 16]), bytes);
            assert!(taken.is_err(), "a frame {what} was taken");
        }
    }

    fn on_offer(&mut self, offer: &Offer) {
        // What was taken in from an earlier stream is durable or dropped by now.
        if self.chance.percent(50) {
            self.commit_waiting();
        }
        self.waiting.clear();
        if self.failed_over.is_some() {
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
        match self.receiver.on_offer(offer, WINDOW) {
            Answer::Accept { position, credit } => {
                // What it says it has, it has to keep.
                self.acked = self.acked.max(position.seq);
                let accept = Accept {
                    group: GROUP,
                    nonce: offer.nonce,
                    position,
                    credit,
                    compare: false,
                    under: None,
                };
                self.send(false, &Message::Accept(accept));
            }
            Answer::Refuse(code) => {
                let head = self.secondary.group.head();
                match code {
                    RefuseCode::Diverged | RefuseCode::Ahead => {
                        assert!(self.ours.count_at(&head).is_none(), "one history taken for two");
                    }
                    RefuseCode::TooFarBehind => {
                        assert!(self.set_back && head.seq.next() < offer.oldest);
                    }
                    other => panic!("refused with {other:?}"),
                }
                let text = "does not fit".into();
                let refuse = Refuse { group: GROUP, code, text, epochs: None };
                self.send(false, &Message::Refuse(refuse));
            }
        }
        // What comes late of an old session is not taken for something of this one.
        for packet in std::mem::take(&mut self.late) {
            let Packet::Frame { fixed, front, content } = packet else { continue };
            let frame = Frame::from_copy(&fixed, front, content).expect("frame");
            let bytes = frame.envelope().wire_len() as u64;
            let taken =
                self.receiver.clone().on_frame(frame.header(), frame.position().hash, bytes);
            assert!(taken.is_err(), "a frame of an old session was taken");
            self.saw("frame of an old session refused");
        }
    }

    pub(super) fn deliver_to_primary(&mut self) {
        let Some(Packet::Control(bytes)) = self.to_primary.pop_front() else { return };
        match Message::decode(&bytes[4..]).expect("message") {
            Message::Accept(accept) => self.on_accept(&accept),
            Message::Ack { seq, .. } => {
                assert!(seq <= self.acked, "acknowledged before it was durable");
                let was_carrying = matches!(self.sender.phase(), Phase::Carrying(_));
                self.sender.on_ack(seq).expect("ack");
                self.primary.group.set_acked(self.sender.acked());
                self.on_carried(was_carrying);
            }
            Message::Credit { limit, .. } => self.sender.on_credit(limit).expect("credit"),
            Message::Refuse(refuse) => {
                if self.sender.on_refuse(refuse.code, refuse.epochs.as_ref()) {
                    assert_eq!(*self.sender.phase(), Phase::Stopped(Stop::Fenced));
                    self.set_fence(Some(Fence {
                        cause: Cause::FailoverAtPeer,
                        epochs: refuse.epochs,
                        since: WallTime(0),
                    }));
                } else {
                    assert!(self.failed_over.is_none(), "a returning primary is fenced");
                }
            }
            other => panic!("unexpected {other:?}"),
        }
    }

    fn on_accept(&mut self, accept: &Accept) {
        let group = &self.primary.group;
        let hash = match group.hash_at(accept.position.seq) {
            Ok(hash) => hash,
            Err(_) if self.primary.disk.is_off() => return,
            Err(error) => panic!("no hash: {error}"),
        };
        let oldest = group.oldest();
        let here = Here { hash, oldest, has_copy: self.has_copy() };
        let late = Accept { nonce: accept.nonce - 1, ..accept.clone() };
        let old = self.sender.clone().on_accept(&late, here);
        assert!(old.is_err(), "an answer to an old offer was taken");
        self.sender.on_accept(accept, here).expect("accept");
        let on_our_line = self.ours.count_at(&accept.position).is_some();
        match self.sender.phase() {
            Phase::Streaming(stream) => {
                assert!(on_our_line, "two histories were joined at {}", accept.position);
                let header = StreamHeader { group: GROUP, nonce: stream.nonce, first: stream.next };
                self.cursor = None;
                self.to_secondary.push_back(Packet::StreamBegin(header.encode()));
                let acked = self.sender.acked();
                if acked < group.acked() {
                    assert!(self.set_back, "the secondary forgot what it had acknowledged");
                    group.set_back_acked(acked);
                } else {
                    group.set_acked(acked);
                }
                self.saw("streaming begun");
            }
            Phase::Carrying(carry) => {
                let carry = *carry;
                // Where it cannot be told, what the secondary has does not matter: all of it is sent.
                let is_trusted = carry.is_proven;
                assert!(on_our_line || !is_trusted, "two histories joined at {}", accept.position);
                let acked = self.sender.acked();
                if acked < group.acked() {
                    assert!(self.set_back, "the secondary forgot what it had acknowledged");
                    group.set_back_acked(acked);
                } else {
                    group.set_acked(acked);
                }
                if !on_our_line {
                    self.saw("another history overtaken by content");
                }
                self.carry(&carry);
            }
            Phase::Stopped(Stop::TooFarBehind { .. }) => {
                assert!(self.set_back, "what the secondary needs is not in the log any more");
                self.saw("too far behind");
            }
            Phase::Stopped(Stop::PeerIsAhead { .. } | Stop::HashDiffers(_)) => {
                assert!(!on_our_line, "one history was taken for two");
                self.saw("histories that differ were noticed");
            }
            other => panic!("cannot resume: {other:?}"),
        }
    }

    /// The secondary makes some of what it took in durable, and says so.
    pub(super) fn commit_waiting(&mut self) {
        if self.waiting.is_empty() || self.failed_over.is_some() {
            return;
        }
        let count = self.chance.between(1, self.waiting.len() as u64) as usize;
        let frames: Vec<Arc<Frame>> =
            self.waiting.iter().take(count).map(|(frame, _)| frame.clone()).collect();
        let Some(appender) = &mut self.secondary.appender else { return };
        match appender.commit_frames(&frames) {
            Ok(done) => {
                self.hindered = done.full.is_some();
                let bytes = self.waiting.drain(..done.frames).map(|(_, bytes)| bytes).sum();
                self.durable_at_secondary(done.head, bytes);
            }
            Err(StoreError::Full(_)) => {
                self.saw("secondary full");
                self.hindered = true;
            }
            Err(_) => self.crash_secondary(),
        }
    }

    fn durable_at_secondary(&mut self, head: Position, bytes: u64) {
        let durable = self.receiver.on_durable(head, bytes);
        self.acked = head.seq;
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
}
