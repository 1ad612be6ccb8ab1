//! What changed, in place of frames: the primary's log gives way, and the secondary comes up to date all
//! the same, or stays where it was.

use srn_core::extent::Extent;
use srn_core::ids::{DiskNo, Seq};
use srn_core::limits::SECTOR;
use srn_core::sender::{Carry, Phase};
use srn_core::wire::Message;
use srn_store::StoreError;
use srn_store::codec::Effort;
use srn_store::group::{Changed, LeapTo, Retention};
use srn_store::manifest::Keep;

use super::talk::Packet;
use super::{GROUP, World};

/// All that leads to a later frame. It arrives as a whole: what a cut in the middle costs is the
/// subject of the simulation `leap`.
#[derive(Debug)]
pub(super) struct Changes {
    nonce: u64,
    to: LeapTo,
    items: Vec<(DiskNo, Extent, Changed)>,
}

impl World {
    pub(super) fn has_copy(&self) -> bool {
        self.primary.group.keep() == Keep::Replica
    }

    /// The primary gives up frames that the secondary has not got. Most often it remembers what
    /// changed since.
    pub(super) fn give_way(&mut self) {
        let (head, acked) = (self.primary.group.head().seq, self.sender.acked());
        if !self.has_copy() || acked >= head {
            return;
        }
        let points = if self.chance.percent(75) { vec![acked] } else { Vec::new() };
        let retention = Retention { keep_from: head, points };
        self.primary.group.set_frees_log(true);
        for _ in 0..self.chance.between(1, 12) {
            match self.primary.group.maintain(&retention) {
                Ok(_) | Err(StoreError::Full(_)) => {}
                Err(_) => return self.crash_primary(),
            }
        }
        self.primary.group.set_frees_log(false);
        if self.primary.group.oldest() > acked.next() {
            self.saw("log gave way");
        }
    }

    /// The secondary needs more than the log holds.
    pub(super) fn carry(&mut self, carry: &Carry) {
        if let Some(appender) = &mut self.primary.appender {
            appender.close_segment();
        }
        let (to, items) = match self.changes(carry) {
            Ok(changes) => changes,
            Err(StoreError::Io { .. } | StoreError::Stopped(_)) => return self.crash_primary(),
            // Its index finds no room.
            Err(StoreError::Full(_)) => return self.cut(),
            Err(error) => panic!("what changed behind {}: {error}", carry.from),
        };
        self.sender.on_carry(to.catalog.at.seq);
        let changes = Changes { nonce: carry.nonce, to, items };
        self.to_secondary.push_back(Packet::Changes(Box::new(changes)));
    }

    fn changes(&mut self, carry: &Carry) -> Result<ChangesOf, StoreError> {
        let group = self.primary.group.clone();
        let mut items = Vec::new();
        if carry.is_proven {
            match group.delta(carry.from.seq) {
                Ok(mut delta) => {
                    while let Some(item) = delta.next()? {
                        items.push(item);
                    }
                    self.saw("what changed was sent");
                    return Ok((delta.to().clone(), items));
                }
                Err(StoreError::NotInHistory(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let view = group.view_at(group.head().seq)?;
        let catalog = view.catalog();
        for (no, disk) in &catalog.disks {
            let mut start = 0;
            while start < disk.sectors {
                let extent = Extent::new(start, (disk.sectors - start).min(64));
                let mut content = vec![0; (extent.sectors * SECTOR) as usize];
                view.read(*no, extent, &mut content)?;
                let zero = content.iter().all(|byte| *byte == 0);
                let zeros = Changed::Zero { trim: false };
                items.push((*no, extent, if zero { zeros } else { Changed::Content(content) }));
                start = extent.end();
            }
        }
        self.saw("everything was sent");
        Ok((LeapTo { epochs: group.epochs(), catalog }, items))
    }

    /// The secondary takes it in.
    pub(super) fn leap(&mut self, changes: Changes) {
        let Changes { nonce, to, items } = changes;
        let at = to.catalog.at;
        let early = self.receiver.clone().on_changes(nonce - 1, at);
        assert!(early.is_err(), "changes of an old session were taken");
        self.receiver.on_changes(nonce, at).expect("the primary sends what is agreed");
        self.secondary.appender = None;
        let group = self.secondary.group.clone();
        self.clock += 1000;
        let now = self.now();
        let leapt = (|| {
            let mut leap = group.begin_leap(to, Effort::Lz4)?;
            for (disk, extent, changed) in items {
                self.receiver.on_change(64).expect("what is granted");
                match changed {
                    Changed::Zero { trim } => leap.zero(disk, extent, trim)?,
                    Changed::Content(content) => leap.content(disk, extent.start, &content)?,
                }
                self.receiver.on_taken(64);
            }
            leap.finish(now)
        })();
        match leapt {
            Ok(appender) => {
                self.secondary.appender = Some(appender);
                let ack = self.receiver.on_leapt().expect("the session is there");
                assert_eq!(ack, at.seq);
                self.acked = ack;
                self.saw("caught up without frames");
                self.secondary.disk.no_fault();
                if self.secondary.disk.is_off() {
                    // In something that nobody waits for.
                    return self.crash_secondary();
                }
                self.check_secondary();
                self.send(false, &Message::Ack { group: GROUP, seq: ack });
            }
            Err(StoreError::Invalid(why)) => panic!("{why}"),
            Err(_) => self.crash_secondary(),
        }
    }

    /// The secondary is where what changed has led to: frames can follow.
    pub(super) fn on_carried(&mut self, was_carrying: bool) {
        if was_carrying && *self.sender.phase() == Phase::Offline {
            self.connect();
        }
    }

    /// Whether the log no longer holds all that the secondary lacks, for all that is known.
    pub(super) fn is_tracking(&self) -> bool {
        let group = &self.primary.group;
        self.has_copy() && group.head().seq > Seq::ZERO && group.oldest() > group.acked().next()
    }
}

type ChangesOf = (LeapTo, Vec<(DiskNo, Extent, Changed)>);
