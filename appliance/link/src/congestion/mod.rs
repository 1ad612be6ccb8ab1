//! Congestion control of the link: a rate-based controller as quinn wants it.
//!
//! quinn's Cubic takes every lost packet for a full queue and comes down to a hundredth of a line
//! that loses one of a hundred; its BBR wastes a quarter of the packets when given room.

pub(crate) mod delivery;
mod rate;
#[cfg(test)]
mod simulation;

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use rate::RateControl;

/// Makes a controller for each path, in quinn's `TransportConfig`.
#[derive(Debug, Clone, Copy)]
pub struct RateBased {
    /// What may be on its way before the path is known, in bytes.
    pub initial_window: u64,
}

/// [`RateControl`] with quinn's clock.
#[derive(Debug, Clone)]
pub(crate) struct RateController {
    machine: RateControl,
    began: Instant,
    initial_window: u64,
}

impl ControllerFactory for RateBased {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(RateController {
            machine: RateControl::new(self.initial_window, current_mtu, 0),
            began: now,
            initial_window: self.initial_window,
        })
    }
}

impl RateController {
    fn at(&self, instant: Instant) -> u64 {
        let since = instant.saturating_duration_since(self.began);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The rate at which the path delivers as far as is known, in bytes per second.
    pub(crate) fn path_rate(&self) -> u64 {
        self.machine.path_rate()
    }

    /// Loss over the last round trips, in millionths of what was sent.
    pub(crate) const fn loss_ppm(&self) -> u64 {
        self.machine.loss_ppm()
    }
}

impl Controller for RateController {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.machine.on_sent(self.at(now), bytes);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.machine.on_ack(self.at(now), self.at(sent), bytes);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.machine.on_acks_end(self.at(now), in_flight, app_limited);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.machine.on_lost(self.at(now), lost_bytes, is_persistent_congestion);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.machine.on_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.machine.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.machine.window();
        metrics.pacing_rate = self.machine.rate().map(|rate| rate.saturating_mul(8));
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
