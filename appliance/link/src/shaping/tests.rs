use std::collections::BTreeMap;

use super::scheduler::{Flow, Next, Scheduler, Traffic};
use crate::congestion::delivery::{SECOND, bytes_in};

const MBIT_100: u64 = 12_500_000;

/// Streams, and what each has sent. All that are `greedy` always have more.
struct Site {
    scheduler: Scheduler,
    now: u64,
    greedy: BTreeMap<Flow, (Traffic, u64)>,
    sent: BTreeMap<Flow, u64>,
}

impl Site {
    fn new(limit: Option<u64>, greedy: &[(Traffic, u64)]) -> Self {
        let mut scheduler = Scheduler::new(0);
        scheduler.set_limit(limit, 0);
        let greedy = (0..).zip(greedy.iter().copied()).collect();
        Self { scheduler, now: 0, greedy, sent: BTreeMap::new() }
    }

    /// Lets time pass; a slice takes as long as a line of `line` bytes per second needs.
    fn run(&mut self, until: u64, line: u64) {
        let slice = self.scheduler.slice();
        for (flow, (kind, weight)) in self.greedy.clone() {
            self.scheduler.ask(flow, kind, weight, slice);
        }
        while self.now < until {
            match self.scheduler.next(self.now) {
                Next::Turn(flow) => {
                    *self.sent.entry(flow).or_default() += slice;
                    self.now += slice * SECOND / line;
                    self.scheduler.done(flow);
                    if let Some((kind, weight)) = self.greedy.get(&flow) {
                        self.scheduler.ask(flow, *kind, *weight, slice);
                    }
                }
                Next::At(at) => {
                    assert!(at > self.now, "time does not pass");
                    self.now = at;
                }
                Next::Nothing => return,
            }
        }
    }

    fn sent(&self, flow: Flow) -> u64 {
        self.sent.get(&flow).copied().unwrap_or(0)
    }

    fn total(&self) -> u64 {
        self.sent.values().sum()
    }
}

#[test]
fn a_hundred_groups_share_a_line_fairly() {
    let mut site = Site::new(None, &[(Traffic::Live, 2); 100]);
    site.run(20 * SECOND, MBIT_100);
    let fair = site.total() / 100;
    for flow in 0..100 {
        let sent = site.sent(flow);
        assert!(sent.abs_diff(fair) <= 2 * 64 * 1024, "{flow}: {sent} of {fair}");
    }
}

#[test]
fn groups_share_by_weight() {
    for kind in [Traffic::Live, Traffic::Bulk] {
        let mut site = Site::new(Some(MBIT_100), &[(kind, 4), (kind, 2), (kind, 1), (kind, 1)]);
        site.run(20 * SECOND, 100 * MBIT_100);
        let total = site.total();
        for (flow, part) in [(0, 2), (1, 4), (2, 8), (3, 8)] {
            let (sent, due) = (site.sent(flow), total / part);
            assert!(sent.abs_diff(due) < due / 20, "{flow}: {sent} of {due}");
        }
    }
}

#[test]
fn bulk_has_a_tenth_beside_live_and_all_without() {
    let kinds = [(Traffic::Live, 2), (Traffic::Live, 2), (Traffic::Bulk, 1), (Traffic::Bulk, 4)];
    let mut site = Site::new(None, &kinds);
    site.run(20 * SECOND, MBIT_100);
    let bulk = 100 * (site.sent(2) + site.sent(3)) / site.total();
    assert!((9..=11).contains(&bulk), "{bulk} %");
    site.greedy.retain(|_, (kind, _)| *kind == Traffic::Bulk);
    for flow in [0, 1] {
        site.scheduler.forget(flow);
    }
    let before = site.total();
    site.run(30 * SECOND, MBIT_100);
    let more = site.total() - before;
    assert!(more >= bytes_in(MBIT_100, 10 * SECOND) * 98 / 100, "{more}");
}

/// A write now and then, beside a hundred initial replications: it waits for a slice, not for them.
#[test]
fn live_does_not_wait_behind_bulk() {
    for limit in [None, Some(MBIT_100), Some(MBIT_100 / 20)] {
        let mut site = Site::new(limit, &[(Traffic::Bulk, 4); 100]);
        let line = limit.map_or(MBIT_100, |_| 100 * MBIT_100);
        let rate = limit.unwrap_or(MBIT_100);
        site.run(SECOND, line);
        for n in 1..200 {
            let asked = site.now;
            site.scheduler.ask(1000, Traffic::Live, 1, 4096);
            let mut turns = 0;
            while !site.scheduler.has_turn(1000) {
                match site.scheduler.next(site.now) {
                    Next::Turn(1000) => {}
                    Next::Turn(flow) => {
                        turns += 1;
                        site.now += site.scheduler.slice() * SECOND / line;
                        site.scheduler.done(flow);
                        site.scheduler.ask(flow, Traffic::Bulk, 4, site.scheduler.slice());
                    }
                    Next::At(at) => site.now = at,
                    Next::Nothing => panic!("a stream asked"),
                }
            }
            site.scheduler.done(1000);
            let waited = site.now - asked;
            // What is overdrawn by the slice before, and no more than that.
            let slice = site.scheduler.slice() * SECOND / rate;
            assert!(
                waited <= slice * (1 + turns) * 11 / 10,
                "{limit:?}: {waited} ns, a slice has {slice}"
            );
            assert!(turns <= 1, "{turns} turns of bulk went before");
            let next = site.now + n * 1_000_000;
            site.run(next, line);
        }
    }
}

#[test]
fn no_more_than_the_limit_is_sent() {
    let mut site = Site::new(Some(MBIT_100), &[(Traffic::Live, 2); 3]);
    site.run(10 * SECOND, 100 * MBIT_100);
    let due = bytes_in(MBIT_100, 10 * SECOND) * 100 / 104;
    assert!(site.total().abs_diff(due) < due / 50, "{} of {due}", site.total());
    // A tenth of it from now on; what was before does not count.
    site.scheduler.set_limit(Some(MBIT_100 / 10), site.now);
    let before = site.total();
    site.run(20 * SECOND, 100 * MBIT_100);
    let (more, due) = (site.total() - before, due / 10);
    assert!(more.abs_diff(due) < due / 20, "{more} of {due}");
    site.scheduler.set_limit(None, site.now);
    let before = site.total();
    site.run(21 * SECOND, 100 * MBIT_100);
    assert!(site.total() - before > bytes_in(MBIT_100, 50 * SECOND));
}

#[test]
fn a_pause_saves_nothing_up() {
    let mut site = Site::new(Some(MBIT_100), &[(Traffic::Live, 2)]);
    site.now = 3_600 * SECOND;
    let began = site.now;
    site.run(began + SECOND, 100 * MBIT_100);
    let due = bytes_in(MBIT_100, SECOND);
    assert!(site.total() < due * 102 / 100, "{} of {due}", site.total());
}

#[test]
fn whoever_slept_does_not_drive_others_out() {
    let mut site = Site::new(None, &[(Traffic::Live, 2), (Traffic::Live, 2)]);
    site.run(10 * SECOND, MBIT_100);
    site.greedy.insert(7, (Traffic::Live, 2));
    let (before, now) = (site.sent(0), site.now);
    site.run(now + SECOND, MBIT_100);
    let (old, new) = (site.sent(0) - before, site.sent(7));
    assert!(new.abs_diff(old) < 512 * 1024, "{new} and {old}");
}

/// The peer does not read one stream: the connection does not take its slice.
#[test]
fn a_stuck_stream_does_not_stall_others() {
    let mut site = Site::new(None, &[(Traffic::Live, 2), (Traffic::Bulk, 2)]);
    for (flow, kind) in [(100, Traffic::Live), (101, Traffic::Bulk)] {
        site.scheduler.ask(flow, kind, 1, 1000);
    }
    let mut stuck = 0;
    while stuck < 2 {
        match site.scheduler.next(site.now) {
            Next::Turn(_) => stuck += 1,
            other => panic!("{other:?}"),
        }
    }
    site.run(SECOND, MBIT_100);
    assert!(site.total() > bytes_in(MBIT_100, SECOND) * 9 / 10, "{}", site.total());
    assert!(site.sent(0) > 0 && site.sent(1) > 0);
}

/// Whatever is asked, done and forgotten in whichever order: whoever waits has its turn some time.
#[test]
fn nobody_waits_for_ever() {
    let mut chance = 11u64;
    let mut below = |end: u64| {
        chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (chance >> 33) % end
    };
    for _ in 0..50 {
        let mut scheduler = Scheduler::new(0);
        let mut now = 0;
        for _ in 0..300 {
            let flow = below(8);
            match below(6) {
                0..3 if !scheduler.has_turn(flow) => {
                    let kind = if below(2) == 0 { Traffic::Live } else { Traffic::Bulk };
                    scheduler.ask(flow, kind, below(5), below(100_000));
                }
                3 => scheduler.done(flow),
                4 => scheduler.forget(flow),
                _ => scheduler.set_limit((below(3) > 0).then(|| below(1 << 26)), now),
            }
            if let Next::At(at) = scheduler.next(now) {
                assert!(at > now);
            }
            now += below(SECOND / 100);
        }
        scheduler.set_limit(Some(1 << 20), now);
        let (mut turns, deadline) = (0, now + 600 * SECOND);
        loop {
            match scheduler.next(now) {
                Next::Turn(flow) => {
                    turns += 1;
                    scheduler.done(flow);
                }
                Next::At(at) => now = at,
                Next::Nothing => break,
            }
            assert!(now < deadline && turns <= 8);
        }
    }
}
