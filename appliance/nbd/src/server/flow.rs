//! How much a connection has in flight, and waiting for less.
//!
//! The reader alone admits requests and counts what it handed over; whoever completes a request on
//! whatever thread counts what is done. The difference is in flight.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::{Notify, OwnedSemaphorePermit};

use super::limits::{Limits, PayloadBudget};

/// The completers' side, shared by all threads.
#[derive(Debug, Default)]
pub(super) struct Flow {
    requests_done: AtomicU64,
    bytes_done: AtomicU64,
    reader_waits: AtomicBool,
    less: Notify,
}

/// What a request occupies; gives its share of the node's budget back when dropped.
#[derive(Debug, Default)]
pub(super) struct Charge {
    bytes: u64,
    _budget: Option<OwnedSemaphorePermit>,
}

impl Flow {
    /// A request was answered.
    pub(super) fn request_done(&self) {
        // Sequentially consistent together with the flag: either the reader sees the count, or
        // this sees that the reader waits.
        self.requests_done.fetch_add(1, Ordering::SeqCst);
        self.wake_reader();
    }

    /// A payload is no longer in memory.
    pub(super) fn release(&self, charge: Charge) {
        let bytes = charge.bytes;
        drop(charge);
        if bytes > 0 {
            self.bytes_done.fetch_add(bytes, Ordering::SeqCst);
            self.wake_reader();
        }
    }

    fn wake_reader(&self) {
        if self.reader_waits.load(Ordering::SeqCst) {
            self.less.notify_one();
        }
    }
}

/// The reader's side.
#[derive(Debug)]
pub(super) struct Admission {
    requests_submitted: u64,
    bytes_submitted: u64,
    requests_max: u64,
    bytes_max: u64,
    budget: PayloadBudget,
}

impl Admission {
    pub(super) fn new(limits: &Limits, budget: PayloadBudget) -> Self {
        Self {
            requests_submitted: 0,
            bytes_submitted: 0,
            requests_max: limits.requests.max(1) as u64,
            bytes_max: limits.payload_bytes as u64,
            budget,
        }
    }

    /// Room for a request with `bytes` of payload, if there is. It counts as in flight from
    /// [`Admission::submitted`] on; the reader holds no more than one such promise.
    pub(super) fn try_admit(&self, flow: &Flow, bytes: u32) -> Option<Charge> {
        if !self.fits(flow, bytes) {
            return None;
        }
        if bytes == 0 {
            return Some(Charge::default());
        }
        let budget = self.budget.bytes.clone().try_acquire_many_owned(self.share(bytes)).ok();
        if budget.is_none() && !self.may_exceed_budget(flow, bytes) {
            return None;
        }
        Some(Charge { bytes: u64::from(bytes), _budget: budget })
    }

    /// Waits for room for a request with `bytes` of payload.
    pub(super) async fn admit(&self, flow: &Flow, bytes: u32) -> Charge {
        loop {
            flow.reader_waits.store(true, Ordering::SeqCst);
            if let Some(charge) = self.try_admit(flow, bytes) {
                flow.reader_waits.store(false, Ordering::SeqCst);
                return charge;
            }
            if self.fits(flow, bytes) {
                // Only the node's budget is missing. The semaphore is fair, so a large payload is
                // not overtaken for ever.
                let budget = self.budget.bytes.clone().acquire_many_owned(self.share(bytes));
                tokio::select! {
                    permit = budget => {
                        flow.reader_waits.store(false, Ordering::SeqCst);
                        return Charge { bytes: u64::from(bytes), _budget: permit.ok() };
                    }
                    () = flow.less.notified() => {}
                }
            } else {
                flow.less.notified().await;
            }
        }
    }

    /// The request the room was for is handed over.
    pub(super) fn submitted(&mut self, charge: &Charge) {
        self.requests_submitted += 1;
        self.bytes_submitted += charge.bytes;
    }

    /// Waits until every request handed over was answered.
    pub(super) async fn all_done(&self, flow: &Flow) {
        loop {
            flow.reader_waits.store(true, Ordering::SeqCst);
            if self.requests_in_flight(flow) == 0 {
                return;
            }
            flow.less.notified().await;
        }
    }

    pub(super) fn requests_in_flight(&self, flow: &Flow) -> u64 {
        self.requests_submitted.wrapping_sub(flow.requests_done.load(Ordering::SeqCst))
    }

    fn bytes_in_flight(&self, flow: &Flow) -> u64 {
        self.bytes_submitted.wrapping_sub(flow.bytes_done.load(Ordering::SeqCst))
    }

    fn fits(&self, flow: &Flow, bytes: u32) -> bool {
        if self.requests_in_flight(flow) >= self.requests_max {
            return false;
        }
        let in_flight = self.bytes_in_flight(flow);
        bytes == 0 || in_flight == 0 || in_flight + u64::from(bytes) <= self.bytes_max
    }

    fn may_exceed_budget(&self, flow: &Flow, bytes: u32) -> bool {
        bytes as usize <= PayloadBudget::ALWAYS && self.bytes_in_flight(flow) == 0
    }

    /// A payload larger than the whole budget takes all of it.
    fn share(&self, bytes: u32) -> u32 {
        bytes.min(u32::try_from(self.budget.total).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(requests: usize, payload_bytes: usize, budget: usize) -> (Flow, Admission) {
        let limits = Limits { requests, payload_bytes, ..Limits::default() };
        (Flow::default(), Admission::new(&limits, PayloadBudget::new(budget)))
    }

    fn submit(flow: &Flow, admission: &mut Admission, bytes: u32) -> Option<Charge> {
        let charge = admission.try_admit(flow, bytes)?;
        admission.submitted(&charge);
        Some(charge)
    }

    #[test]
    fn requests_are_capped() {
        let (flow, mut admission) = admission(2, 1 << 20, 1 << 20);
        assert!(submit(&flow, &mut admission, 0).is_some());
        assert!(submit(&flow, &mut admission, 0).is_some());
        assert!(submit(&flow, &mut admission, 0).is_none());
        flow.request_done();
        assert!(submit(&flow, &mut admission, 0).is_some());
    }

    #[test]
    fn bytes_are_capped_but_for_one_lonely_request() {
        let (flow, mut admission) = admission(9, 1000, 1 << 20);
        let large = submit(&flow, &mut admission, 5000).unwrap();
        assert!(submit(&flow, &mut admission, 1).is_none());
        assert!(submit(&flow, &mut admission, 0).is_some(), "nothing needs no room");
        flow.release(large);
        let small = submit(&flow, &mut admission, 600).unwrap();
        assert!(submit(&flow, &mut admission, 600).is_none());
        assert!(submit(&flow, &mut admission, 400).is_some());
        drop(small);
    }

    #[test]
    fn the_budget_is_shared_and_comes_back() {
        let (flow, mut first) = admission(9, 4 << 20, 1 << 20);
        let (other_flow, mut second) = admission(9, 4 << 20, 1);
        second.budget = first.budget.clone();
        let all = submit(&flow, &mut first, 2 << 20).unwrap();
        assert_eq!(first.budget.available(), 0);
        assert!(submit(&other_flow, &mut second, 512 << 10).is_none());
        let always = submit(&other_flow, &mut second, 256 << 10).expect("always permitted");
        assert!(
            submit(&other_flow, &mut second, 4096).is_none(),
            "only while nothing is in flight"
        );
        other_flow.release(always);
        drop(all);
        assert_eq!(first.budget.available(), 1 << 20);
        assert!(submit(&other_flow, &mut second, 512 << 10).is_some());
    }
}
