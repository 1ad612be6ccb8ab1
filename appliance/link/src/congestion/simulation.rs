//! Flows through one bottleneck, packet by packet, in virtual time: what the controller promises
//! is checked without a clock and without a wire. Each run is decided by its seed.
//!
//! The wire: a queue of a given size in bytes in front of a line of a given rate, then a delay, then
//! chance decides what arrives. Senders behave as quinn's do: packets of 1452, an acknowledgement
//! for each second one, loss by three newer ones, a pacer of its own at 1.25 windows a round trip.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::delivery::{SECOND, bytes_in, rate_of};
use super::rate::RateControl;

const MS: u64 = 1_000_000;
const PACKET: u64 = 1452;
/// IP and UDP.
const HEADERS: u64 = 28;

/// What decides how much a flow sends.
enum Control {
    Rate(Box<RateControl>),
    Cubic(Cubic),
}

/// TCP's usual one (RFC 9438), to be compared and shared with.
struct Cubic {
    window: f64,
    threshold: f64,
    most: f64,
    since: u64,
    reno: f64,
    recovery: u64,
}

impl Cubic {
    fn new() -> Self {
        Self { window: 10.0, threshold: f64::MAX, most: 0.0, since: 0, reno: 0.0, recovery: 0 }
    }

    fn on_ack(&mut self, now: u64, trip: u64) {
        if self.window < self.threshold {
            self.window += 1.0;
            return;
        }
        let k = (self.most * 0.3 / 0.4).cbrt();
        let t = (now - self.since + trip) as f64 / SECOND as f64;
        let target = (0.4 * (t - k).powi(3) + self.most).clamp(self.window, 1.5 * self.window);
        self.reno += 3.0 * 0.3 / 1.7 / self.window;
        let cubic = self.window + (target - self.window) / self.window;
        self.window = if self.reno > cubic { self.reno } else { cubic };
    }

    fn on_lost(&mut self, now: u64, sent: u64) {
        if sent < self.recovery {
            return;
        }
        self.recovery = now;
        self.since = now;
        self.most = if self.window < self.most { self.window * 0.85 } else { self.window };
        self.window = (self.window * 0.7).max(2.0);
        self.threshold = self.window;
        self.reno = self.window;
    }
}

/// A flow that always has something to send, from `from` to `to`.
struct Flow {
    control: Control,
    from: u64,
    to: u64,
    next: u64,
    /// When each packet that is on its way was sent.
    out: BTreeMap<u64, u64>,
    /// Packets that arrived and were not acknowledged.
    arrived: Vec<u64>,
    trip: u64,
    tokens: f64,
    paced: u64,
    woken: bool,
    heard: u64,
    sent: u64,
    lost: u64,
    delivered: u64,
    /// Packets delivered in each tenth of a second.
    tenths: Vec<u64>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(usize, u64),
    Ack(usize, Vec<u64>),
    Wake(usize),
    Silence(usize),
}

/// The wire.
#[derive(Clone, Copy)]
struct Wire {
    /// Bytes per second.
    rate: u64,
    trip: u64,
    /// Bytes that wait at most.
    queue: u64,
    /// Packets lost of ten thousand.
    loss: u64,
    /// The far end stands still for up to this time, now and then: a busy machine.
    stall: u64,
}

struct World {
    wire: Wire,
    flows: Vec<Flow>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    number: u64,
    now: u64,
    /// When the line has sent all that waits.
    free: u64,
    dropped: u64,
    chance: u64,
    /// The sum of the time in the queue of all packets, and their number.
    waited: (u64, u64),
    /// The rate changes at a time.
    change: Option<(u64, u64)>,
}

fn rate(from: u64, to: u64) -> Flow {
    flow(Control::Rate(Box::new(RateControl::new(65_000, 1452, from))), from, to)
}

fn cubic(from: u64, to: u64) -> Flow {
    flow(Control::Cubic(Cubic::new()), from, to)
}

fn flow(control: Control, from: u64, to: u64) -> Flow {
    Flow {
        control,
        from,
        to,
        next: 0,
        out: BTreeMap::new(),
        arrived: Vec::new(),
        trip: 333 * MS,
        tokens: 0.0,
        paced: from,
        woken: false,
        heard: from,
        sent: 0,
        lost: 0,
        delivered: 0,
        tenths: Vec::new(),
    }
}

impl Flow {
    fn window(&self) -> u64 {
        match &self.control {
            Control::Rate(rate) => rate.window(),
            Control::Cubic(cubic) => (cubic.window * PACKET as f64) as u64,
        }
    }

    fn in_flight(&self) -> u64 {
        self.out.len() as u64 * PACKET
    }

    /// quinn's pacer: how long to wait.
    fn pace(&mut self, now: u64) -> Option<u64> {
        let window = self.window() as f64;
        let per_ns = 1.25 * window / self.trip as f64;
        let capacity =
            (2.0 * MS as f64 * per_ns / 1.25).clamp(10.0 * PACKET as f64, 256.0 * PACKET as f64);
        self.tokens = (self.tokens + (now - self.paced) as f64 * per_ns).min(capacity);
        self.paced = now;
        if self.tokens >= PACKET as f64 {
            return None;
        }
        Some(now + ((capacity - self.tokens) / per_ns) as u64 + 1)
    }

    fn on_ack(&mut self, now: u64, packets: &[u64]) {
        self.heard = now;
        let mut newest = None;
        for packet in packets {
            let Some(sent) = self.out.remove(packet) else { continue };
            newest = Some(sent);
            self.delivered += 1;
            let tenth = (now / (SECOND / 10)) as usize;
            self.tenths.resize(self.tenths.len().max(tenth + 1), 0);
            self.tenths[tenth] += 1;
            match &mut self.control {
                Control::Rate(rate) => rate.on_ack(now, sent, PACKET),
                Control::Cubic(cubic) => cubic.on_ack(now, self.trip),
            }
        }
        if let Control::Rate(rate) = &mut self.control {
            rate.on_acks_end(now, self.out.len() as u64 * PACKET, false);
        }
        if let Some(sent) = newest {
            let trip = now - sent;
            self.trip = if self.trip == 333 * MS { trip } else { (7 * self.trip + trip) / 8 };
        }
        let largest = packets.iter().max().copied().unwrap_or(0);
        self.lose(now, largest.saturating_sub(2));
    }

    /// All packets before this one that are on their way are lost.
    fn lose(&mut self, now: u64, before: u64) {
        let keep = self.out.split_off(&before);
        let lost = std::mem::replace(&mut self.out, keep);
        if lost.is_empty() {
            return;
        }
        self.lost += lost.len() as u64;
        match &mut self.control {
            Control::Rate(rate) => rate.on_lost(now, lost.len() as u64 * PACKET, false),
            Control::Cubic(cubic) => {
                lost.values().for_each(|sent| cubic.on_lost(now, *sent));
            }
        }
    }
}

impl World {
    fn new(wire: Wire, seed: u64, flows: Vec<Flow>) -> Self {
        let mut world = Self {
            wire,
            flows,
            events: BinaryHeap::new(),
            number: 0,
            now: 0,
            free: 0,
            dropped: 0,
            chance: seed,
            waited: (0, 0),
            change: None,
        };
        for flow in 0..world.flows.len() {
            world.at(world.flows[flow].from, Event::Wake(flow));
            world.at(world.flows[flow].from + SECOND, Event::Silence(flow));
        }
        world
    }

    fn at(&mut self, at: u64, event: Event) {
        self.number += 1;
        self.events.push(Reverse((at, self.number, event)));
    }

    fn below(&mut self, end: u64) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn run(&mut self, until: u64) {
        while self.events.peek().is_some_and(|Reverse((at, ..))| *at <= until) {
            let Some(Reverse((at, _, event))) = self.events.pop() else { return };
            self.now = at;
            if let Some((when, rate)) = self.change
                && at >= when
            {
                self.wire.rate = rate;
            }
            match event {
                Event::Wake(flow) => {
                    self.flows[flow].woken = false;
                    self.send(flow);
                }
                Event::Arrive(flow, packet) => {
                    let arrived = &mut self.flows[flow].arrived;
                    arrived.push(packet);
                    if arrived.len() >= 2 {
                        let packets = std::mem::take(arrived);
                        self.at(at + self.wire.trip / 2, Event::Ack(flow, packets));
                    }
                }
                Event::Ack(flow, packets) => {
                    self.flows[flow].on_ack(at, &packets);
                    self.send(flow);
                }
                Event::Silence(flow) => self.silence(flow),
            }
        }
    }

    /// Nothing was heard for long: all is lost.
    fn silence(&mut self, flow: usize) {
        let quiet = 3 * self.flows[flow].trip + 25 * MS;
        let next = self.flows[flow].heard + quiet;
        if next > self.now {
            return self.at(next, Event::Silence(flow));
        }
        let all = self.flows[flow].next;
        self.flows[flow].lose(self.now, all);
        self.flows[flow].heard = self.now;
        self.at(self.now + quiet, Event::Silence(flow));
        self.send(flow);
    }

    fn send(&mut self, number: usize) {
        let now = self.now;
        loop {
            let flow = &mut self.flows[number];
            if now >= flow.to || flow.in_flight() + PACKET >= flow.window() {
                return;
            }
            if let Some(wait) = flow.pace(now) {
                if !flow.woken {
                    flow.woken = true;
                    self.at(wait, Event::Wake(number));
                }
                return;
            }
            flow.tokens -= PACKET as f64;
            let packet = flow.next;
            flow.next += 1;
            flow.sent += 1;
            flow.out.insert(packet, now);
            if let Control::Rate(rate) = &mut flow.control {
                rate.on_sent(now, PACKET);
            }
            self.forward(number, packet);
        }
    }

    /// Into the queue, over the line, perhaps to the other end.
    fn forward(&mut self, flow: usize, packet: u64) {
        let begins = self.free.max(self.now);
        let waiting = bytes_in(self.wire.rate, begins - self.now);
        if waiting + PACKET + HEADERS > self.wire.queue {
            self.dropped += 1;
            return;
        }
        self.waited.0 += begins - self.now;
        self.waited.1 += 1;
        self.free = begins + (PACKET + HEADERS) * SECOND / self.wire.rate;
        if self.below(10_000) >= self.wire.loss {
            let at = self.free + self.wire.trip / 2;
            self.at(at + self.stalled(at), Event::Arrive(flow, packet));
        }
    }

    /// How much longer something takes because the far end stands still at `at`.
    const fn stalled(&self, at: u64) -> u64 {
        let (turn, since) = (at / (40 * MS), at % (40 * MS));
        let length = (turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % (self.wire.stall + 1);
        length.saturating_sub(since)
    }

    /// Part of the line that a flow got from `from` to `to`, in percent.
    fn share(&self, flow: usize, from: u64, to: u64) -> f64 {
        let tenth = SECOND / 10;
        let packets: u64 = self.flows[flow]
            .tenths
            .iter()
            .skip((from / tenth) as usize)
            .take(((to - from) / tenth) as usize)
            .sum();
        100.0 * rate_of(packets * (PACKET + HEADERS), to - from) as f64 / self.wire.rate as f64
    }

    /// Packets that were sent in vain, in percent.
    fn wasted(&self, flow: usize) -> f64 {
        100.0 * self.flows[flow].lost as f64 / self.flows[flow].sent as f64
    }

    /// The mean time in the queue, in milliseconds.
    fn queued(&self) -> f64 {
        self.waited.0 as f64 / self.waited.1.max(1) as f64 / MS as f64
    }
}

fn mbit(rate: u64) -> u64 {
    rate * 125_000
}

/// `queue` in percent of what the line holds.
fn wire(rate: u64, trip_ms: u64, queue: u64, loss: u64) -> Wire {
    let holds = bytes_in(mbit(rate), trip_ms * MS);
    Wire { rate: mbit(rate), trip: trip_ms * MS, queue: holds * queue / 100, loss, stall: 0 }
}

fn alone(wire: Wire, seed: u64, control: fn(u64, u64) -> Flow) -> World {
    let end = 15 * SECOND;
    let mut world = World::new(wire, seed, vec![control(0, end)]);
    world.run(end);
    world
}

/// Goodput is 0.965 of the share: QUIC's, UDP's and IP's headers take the rest.
#[test]
fn a_lossy_line_is_kept_full_and_little_is_wasted() {
    for (queue, loss) in [(25, 100), (50, 0), (100, 100), (100, 10), (400, 100), (100, 200)] {
        let world = alone(wire(200, 50, queue, loss), 1 + loss, rate);
        let share = world.share(0, 2 * SECOND, 15 * SECOND);
        let (wasted, queued) = (world.wasted(0), world.queued());
        let what = format!("queue {queue} loss {loss}: {share:.1} % {wasted:.1} % {queued:.1} ms");
        assert!(share > 93.5, "{what}");
        assert!(wasted < 5.0, "{what}");
        // What is said in between does not wait long.
        assert!(queued < 10.0, "{what}");
    }
}

#[test]
fn so_are_slow_fast_and_long_lines() {
    for (rate_, trip, queue, loss) in
        [(2, 50, 200, 100), (20, 50, 100, 100), (1000, 20, 50, 100), (200, 250, 50, 20)]
    {
        let world = alone(wire(rate_, trip, queue, loss), 7, rate);
        let share = world.share(0, 5 * SECOND, 15 * SECOND);
        let what = format!("{rate_} Mbit/s, {trip} ms: {share:.1} %, {:.1} %", world.wasted(0));
        assert!(share > 90.0 && world.wasted(0) < 5.0, "{what}");
    }
}

/// What is compared with is what it is in the world: it collapses at any loss, and fills a queue.
#[test]
fn the_simulated_tcp_is_like_tcp() {
    let lossy = alone(wire(200, 50, 100, 100), 3, cubic);
    assert!(lossy.share(0, 2 * SECOND, 15 * SECOND) < 5.0);
    let clear = alone(wire(200, 50, 100, 0), 3, cubic);
    assert!(clear.share(0, 2 * SECOND, 15 * SECOND) > 90.0);
    assert!(clear.queued() > 20.0);
}

#[test]
fn tcp_keeps_its_part_of_a_line() {
    for queue in [50, 100, 200] {
        for tcp_first in [false, true] {
            let end = 60 * SECOND;
            let flows = if tcp_first {
                vec![rate(3 * SECOND, end), cubic(0, end)]
            } else {
                vec![rate(0, end), cubic(3 * SECOND, end)]
            };
            let mut world = World::new(wire(200, 50, queue, 0), 1, flows);
            world.run(end);
            let share = |flow| world.share(flow, 15 * SECOND, end);
            let (ours, tcp) = (share(0), share(1));
            let what = format!("queue {queue}, TCP first {tcp_first}: {ours:.1} % and {tcp:.1} %");
            assert!(ours > 25.0 && tcp > 25.0 && ours + tcp > 90.0, "{what}");
        }
    }
}

#[test]
fn two_of_ours_share_a_line() {
    let end = 40 * SECOND;
    let flows = vec![rate(0, end), rate(5 * SECOND, end)];
    let mut world = World::new(wire(200, 50, 100, 100), 5, flows);
    world.run(end);
    let share = |flow| world.share(flow, 15 * SECOND, end);
    let (one, other) = (share(0), share(1));
    assert!(one > 30.0 && other > 30.0 && one + other > 80.0, "{one:.1} % and {other:.1} %");
    assert!(world.wasted(0) < 5.0 && world.wasted(1) < 5.0);
}

#[test]
fn a_line_that_changes_is_followed() {
    for (before, after) in [(200, 50), (50, 200)] {
        let end = 25 * SECOND;
        let mut line = wire(before, 50, 100, 50);
        line.queue = bytes_in(mbit(200), 50 * MS);
        let mut world = World::new(line, 9, vec![rate(0, end)]);
        world.change = Some((10 * SECOND, mbit(after)));
        world.run(end);
        let share = world.share(0, 15 * SECOND, end);
        let what = format!("{before} to {after}: {share:.1} %, {:.1} % wasted", world.wasted(0));
        assert!(share > 90.0 && world.wasted(0) < 6.0, "{what}");
    }
}

#[test]
fn a_line_that_was_dead_is_used_again() {
    let end = 20 * SECOND;
    let mut world = World::new(wire(200, 50, 100, 100), 4, vec![rate(0, end)]);
    world.run(5 * SECOND);
    let loss = std::mem::replace(&mut world.wire.loss, 10_000);
    world.run(8 * SECOND);
    world.wire.loss = loss;
    world.run(end);
    let share = world.share(0, 13 * SECOND, end);
    assert!(share > 80.0, "{share:.1} %");
}

/// The far end takes packets in bunches, and so does the line: that is no full queue.
#[test]
fn a_busy_far_end_costs_little() {
    for loss in [0, 10, 100] {
        let line = Wire { stall: 15 * MS, ..wire(200, 50, 100, loss) };
        let world = alone(line, 1, rate);
        let (share, wasted) = (world.share(0, 2 * SECOND, 15 * SECOND), world.wasted(0));
        assert!(share > 90.0 && wasted < 5.0, "loss {loss}: {share:.1} %, {wasted:.1} % wasted");
    }
}
