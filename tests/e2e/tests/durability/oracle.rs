//! Knows every write that a client has sent, and judges whether what a disk shows can be the result
//! of a prefix of them in one order.
//!
//! Every sector carries the number of the write that it came from, so that a state names for each
//! sector its last writer. A state is right when some order of some of the writes leads to it, such
//! that
//! * a write that was answered before another was sent comes before it, and is there if the other
//!   is;
//! * each write is there wholly or not at all.
//!
//! That is decided exactly: the writes that must be there are known, each of them comes before the
//! last writer of every sector it touched, and an order exists when no circle is among these.
//!
//! NBD itself promises less: a write that fails may be there in parts. The product's log promises
//! that a write of at most 256 KiB which holds no run of zeros of 32 KiB is one record of one frame,
//! and a frame is kept or cut as a whole. All writes here are such, so the stronger is demanded.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::{Bytes, BytesMut};
use srn_e2e::Chance;

/// Bytes of a sector: the unit in which everything is judged.
pub(crate) const SECTOR: usize = 512;

/// The longest write that is one frame, in sectors.
pub(crate) const ATOMIC_SECTORS: usize = 512;

/// A moment: it counts what the client has seen happen.
pub(crate) type Moment = u64;

/// A write's number, from 1. Zero stands for what was there before all of them.
pub(crate) type Number = u64;

/// One write.
#[derive(Debug, Clone)]
pub(crate) struct Write {
    pub(crate) disk: usize,
    pub(crate) start: usize,
    pub(crate) sectors: usize,
    sent: Moment,
    /// From here on it is in the log or never will be.
    ended: Option<Moment>,
    answered: bool,
}

/// The last writer of every sector of every disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State(Vec<Vec<Number>>);

/// A state that was seen over NBD while no new write was under way.
#[derive(Debug)]
struct Seen {
    at: Moment,
    state: State,
}

/// What is known of the writes.
#[derive(Debug)]
pub(crate) struct Oracle {
    seed: u64,
    /// Sectors of each disk.
    disks: Vec<usize>,
    writes: Vec<Write>,
    now: Moment,
    seen: Vec<Seen>,
}

impl Oracle {
    /// Nothing was written to disks of these sizes in sectors.
    pub(crate) const fn new(seed: u64, disks: Vec<usize>) -> Self {
        Self { seed, disks, writes: Vec::new(), now: 0, seen: Vec::new() }
    }

    /// This moment.
    pub(crate) const fn now(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// A write is about to be sent: its number and content.
    pub(crate) fn send(&mut self, disk: usize, start: usize, sectors: usize) -> (Number, Bytes) {
        assert!(sectors <= ATOMIC_SECTORS && start + sectors <= self.disks[disk]);
        let sent = self.now();
        self.writes.push(Write { disk, start, sectors, sent, ended: None, answered: false });
        let number = self.writes.len() as Number;
        (number, self.content(number))
    }

    /// The content of a write.
    pub(crate) fn content(&self, number: Number) -> Bytes {
        let write = self.write(number);
        let mut content = BytesMut::zeroed(write.sectors * SECTOR);
        for (at, sector) in content.chunks_mut(SECTOR).enumerate() {
            fill(sector, self.seed, number, write.disk, write.start + at);
        }
        content.freeze()
    }

    /// A write.
    pub(crate) fn write(&self, number: Number) -> &Write {
        &self.writes[number as usize - 1]
    }

    /// The first sector of a write.
    pub(crate) fn start(&self, number: Number) -> usize {
        self.write(number).start
    }

    /// A write was answered.
    pub(crate) fn answer(&mut self, number: Number) {
        let now = self.now();
        let write = &mut self.writes[number as usize - 1];
        write.ended = Some(now);
        write.answered = true;
    }

    /// A write was not answered, its connection is gone, and it will not be sent again: from now on
    /// it is there or never will be.
    pub(crate) fn abandon(&mut self, number: Number) {
        let now = self.now();
        self.writes[number as usize - 1].ended = Some(now);
    }

    /// Writes that were neither answered nor abandoned.
    pub(crate) fn open(&self) -> Vec<Number> {
        let open = |(_, write): &(usize, &Write)| write.ended.is_none();
        self.writes.iter().enumerate().filter(open).map(|(at, _)| at as Number + 1).collect()
    }

    /// Writes that were answered.
    pub(crate) fn answered(&self) -> usize {
        self.writes.iter().filter(|write| write.answered).count()
    }

    /// Writes that were sent.
    pub(crate) const fn sent(&self) -> usize {
        self.writes.len()
    }

    /// Reads a state from what disks hold.
    ///
    /// # Errors
    /// Names the first sector that no write can have left so.
    pub(crate) fn read(&self, disks: &[Vec<u8>]) -> Result<State, String> {
        assert_eq!(disks.len(), self.disks.len());
        let mut state = Vec::new();
        for (disk, content) in disks.iter().enumerate() {
            if content.len() != self.disks[disk] * SECTOR {
                return Err(format!("disk {disk} has {} bytes", content.len()));
            }
            let sectors = content.chunks_exact(SECTOR).enumerate();
            let shown: Result<Vec<Number>, String> =
                sectors.map(|(at, sector)| self.writer_of(disk, at, sector)).collect();
            state.push(shown?);
        }
        Ok(State(state))
    }

    fn writer_of(&self, disk: usize, at: usize, sector: &[u8]) -> Result<Number, String> {
        if sector.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        let mut number = [0; 8];
        number.copy_from_slice(&sector[..8]);
        let number = Number::from_le_bytes(number);
        let place = format!("disk {disk}, sector {at}");
        let known = usize::try_from(number).is_ok_and(|n| n >= 1 && n <= self.writes.len());
        if !known {
            return Err(format!("{place} holds what nobody wrote"));
        }
        let write = self.write(number);
        if write.disk != disk || !(write.start..write.start + write.sectors).contains(&at) {
            return Err(format!("{place} holds content of write {number}, which was {write:?}"));
        }
        let mut expected = [0; SECTOR];
        fill(&mut expected, self.seed, number, disk, at);
        if sector == expected {
            Ok(number)
        } else {
            Err(format!("{place} holds damaged content of write {number}"))
        }
    }

    /// Judges a state that was seen over NBD at this moment, with no write under way but those that
    /// are open. Whatever is judged later must fit it.
    ///
    /// # Errors
    /// Why it cannot be.
    pub(crate) fn see(&mut self, state: State) -> Result<(), String> {
        let at = self.now();
        self.judge(&state, at, Moment::MAX)?;
        self.seen.push(Seen { at, state });
        Ok(())
    }

    /// Judges a state: everything answered up to `holds` must be there, and nothing that was sent
    /// after `before`.
    ///
    /// # Errors
    /// Why it cannot be.
    pub(crate) fn judge(&self, state: &State, holds: Moment, before: Moment) -> Result<(), String> {
        let visible: BTreeSet<Number> =
            state.0.iter().flatten().copied().filter(|number| *number > 0).collect();
        if let Some(late) = visible.iter().find(|number| self.write(**number).sent > before) {
            return Err(format!("write {late} shows, which was sent later"));
        }
        let newest = visible.iter().map(|number| self.write(*number).sent).max().unwrap_or(0);
        let mut order = Order::default();
        for (at, write) in self.writes.iter().enumerate() {
            let number = at as Number + 1;
            let must =
                write.answered && write.ended.is_some_and(|ended| ended < newest || ended <= holds);
            if must || visible.contains(&number) {
                order.add(number, write.sent, write.ended);
            }
        }
        for number in order.numbers() {
            let write = self.write(number);
            let shown = &state.0[write.disk][write.start..write.start + write.sectors];
            for (at, last) in shown.iter().enumerate() {
                if *last == 0 {
                    let sector = write.start + at;
                    return Err(format!(
                        "write {number} must be there, {write:?}, but its sector {sector} is as if \
                         never written"
                    ));
                }
                order.before(number, *last);
            }
        }
        self.add_seen(&mut order)?;
        order.check().map_err(|circle| {
            let writes: Vec<String> = circle
                .into_iter()
                .map(|number| format!("  {number}: {:?}", self.write(number)))
                .collect();
            format!(
                "no order of the writes leads to this state; among these is a circle:\n{}",
                writes.join("\n")
            )
        })
    }

    /// What was seen before.
    fn add_seen(&self, order: &mut Order) -> Result<(), String> {
        let mut since = 0;
        for seen in &self.seen {
            // What ended earlier was compared with an earlier sight.
            for number in order.numbers() {
                let write = self.write(number);
                if !write.ended.is_some_and(|ended| ended > since && ended <= seen.at) {
                    continue;
                }
                let shown = &seen.state.0[write.disk][write.start..write.start + write.sectors];
                for last in shown {
                    if *last == 0 {
                        return Err(format!(
                            "write {number} was not there at {}, and is now: {write:?}",
                            seen.at
                        ));
                    }
                    order.before(number, *last);
                }
            }
            since = seen.at;
        }
        Ok(())
    }
}

/// Fills a sector so that it tells where it came from.
fn fill(sector: &mut [u8], seed: u64, number: Number, disk: usize, at: usize) {
    let place = ((disk as u64) << 48) | at as u64;
    Chance::new(seed ^ number.rotate_left(32) ^ place).fill(sector);
    sector[..8].copy_from_slice(&number.to_le_bytes());
    sector[8..16].copy_from_slice(&place.to_le_bytes());
}

/// Writes that are there, and what is known of their order.
#[derive(Debug, Default)]
struct Order {
    writes: BTreeMap<Number, (Moment, Option<Moment>)>,
    edges: BTreeSet<(Number, Number)>,
}

impl Order {
    fn add(&mut self, number: Number, sent: Moment, ended: Option<Moment>) {
        self.writes.insert(number, (sent, ended));
    }

    fn numbers(&self) -> Vec<Number> {
        self.writes.keys().copied().collect()
    }

    /// `first` comes before `then`, if both are there.
    fn before(&mut self, first: Number, then: Number) {
        if first != then && self.writes.contains_key(&then) {
            self.edges.insert((first, then));
        }
    }

    /// Whether there is an order.
    ///
    /// # Errors
    /// Some of the writes that wait for each other.
    fn check(self) -> Result<(), Vec<Number>> {
        // Beside the writes there is a node for each end of a write, in a chain by time: it comes
        // after the write that ended and before all that were sent later.
        let mut ends: Vec<Moment> = self.writes.values().filter_map(|(_, ended)| *ended).collect();
        ends.sort_unstable();
        ends.dedup();
        let place: BTreeMap<Number, usize> =
            self.writes.keys().enumerate().map(|(at, number)| (*number, at)).collect();
        let count = place.len() + ends.len();
        let mut next: Vec<Vec<usize>> = vec![Vec::new(); count];
        let mut waits = vec![0usize; count];
        let mut edge = |from: usize, to: usize| {
            next[from].push(to);
            waits[to] += 1;
        };
        let end_node = |at: usize| place.len() + at;
        for at in 1..ends.len() {
            edge(end_node(at - 1), end_node(at));
        }
        for (number, (sent, ended)) in &self.writes {
            if let Some(ended) = ended {
                edge(place[number], end_node(ends.partition_point(|end| end < ended)));
            }
            if let Some(last) = ends.partition_point(|end| end < sent).checked_sub(1) {
                edge(end_node(last), place[number]);
            }
        }
        for (first, then) in &self.edges {
            edge(place[first], place[then]);
        }
        let mut ready: VecDeque<usize> = (0..count).filter(|node| waits[*node] == 0).collect();
        while let Some(node) = ready.pop_front() {
            for then in std::mem::take(&mut next[node]) {
                waits[then] -= 1;
                if waits[then] == 0 {
                    ready.push_back(then);
                }
            }
        }
        let stuck: Vec<Number> =
            place.iter().filter(|(_, at)| waits[**at] > 0).map(|(number, _)| *number).collect();
        if stuck.is_empty() { Ok(()) } else { Err(stuck.into_iter().take(12).collect()) }
    }
}

/// The oracle must be able to say no.
mod tests {
    use super::{Number, Oracle, SECTOR, State};

    fn oracle() -> Oracle {
        Oracle::new(7, vec![4])
    }

    fn shows(oracle: &Oracle, last: [Number; 4], holds: u64) -> bool {
        oracle.judge(&State(vec![last.to_vec()]), holds, u64::MAX).is_ok()
    }

    #[test]
    fn what_was_answered_is_demanded() {
        let mut oracle = oracle();
        let (one, _) = oracle.send(0, 0, 2);
        let (two, _) = oracle.send(0, 1, 2);
        oracle.answer(one);
        oracle.answer(two);
        let now = oracle.now();
        assert!(shows(&oracle, [1, 2, 2, 0], now) && shows(&oracle, [1, 1, 2, 0], now));
        assert!(shows(&oracle, [0; 4], 0), "a prefix may be empty");
        assert!(!shows(&oracle, [0; 4], now));
        assert!(!shows(&oracle, [1, 1, 0, 0], now), "the second is gone");
    }

    #[test]
    fn a_prefix_has_no_holes() {
        let mut oracle = oracle();
        for at in 0..3 {
            let (number, _) = oracle.send(0, at, 1);
            oracle.answer(number);
        }
        assert!(shows(&oracle, [1, 2, 0, 0], 0));
        assert!(!shows(&oracle, [1, 0, 3, 0], 0), "the third without the second");
        assert!(!shows(&oracle, [0, 0, 3, 0], 0));
    }

    #[test]
    fn writes_are_whole_and_in_order() {
        let mut oracle = oracle();
        let (one, _) = oracle.send(0, 0, 4);
        assert!(shows(&oracle, [1; 4], 0) && shows(&oracle, [0; 4], 0));
        assert!(!shows(&oracle, [1, 1, 0, 0], 0), "half of a write");
        oracle.answer(one);
        let (two, _) = oracle.send(0, 1, 2);
        assert!(shows(&oracle, [1, 2, 2, 1], 0));
        assert!(!shows(&oracle, [1, 2, 1, 1], 0), "half of the second");
        oracle.answer(two);
        assert!(!shows(&oracle, [1; 4], u64::MAX), "the first after the second");
    }

    #[test]
    fn two_writes_at_once_have_one_order() {
        let mut oracle = oracle();
        let (one, _) = oracle.send(0, 0, 3);
        let (two, _) = oracle.send(0, 0, 4);
        oracle.answer(one);
        oracle.answer(two);
        assert!(shows(&oracle, [1, 1, 1, 2], 9) && shows(&oracle, [2; 4], 9));
        assert!(!shows(&oracle, [1, 2, 1, 2], 9), "a mixture");
    }

    #[test]
    fn what_did_not_come_never_comes() {
        let mut oracle = oracle();
        let (one, _) = oracle.send(0, 0, 1);
        let (two, _) = oracle.send(0, 0, 1);
        oracle.answer(one);
        oracle.abandon(two);
        assert!(shows(&oracle, [2, 0, 0, 0], 9), "it may have come");
        oracle.see(State(vec![vec![1, 0, 0, 0]])).unwrap();
        assert!(!shows(&oracle, [2, 0, 0, 0], 9), "but not after it was looked");
        let (three, _) = oracle.send(0, 1, 1);
        oracle.abandon(three);
        oracle.see(State(vec![vec![1, 0, 0, 0]])).unwrap();
        assert!(!shows(&oracle, [1, 3, 0, 0], 9));
    }

    #[test]
    fn contents_are_recognised() {
        let mut oracle = oracle();
        let (_, content) = oracle.send(0, 1, 2);
        let mut disk = vec![0; 4 * SECTOR];
        disk[SECTOR..3 * SECTOR].copy_from_slice(&content);
        assert_eq!(oracle.read(&[disk.clone()]), Ok(State(vec![vec![0, 1, 1, 0]])));
        disk.swap(SECTOR + 100, SECTOR + 101);
        assert!(oracle.read(&[disk.clone()]).unwrap_err().contains("damaged"));
        disk.rotate_left(SECTOR);
        assert!(oracle.read(&[disk]).is_err());
    }
}
