//! The node's clocks: the one place where they are read.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use srn_core::time::{Mono, Now, WallTime};

use crate::bandwidth::Moment;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// All clocks, read together.
#[must_use]
pub fn now() -> Now {
    Now { mono: mono(), wall: wall() }
}

/// The monotonic clock, in microseconds since the process began.
#[must_use]
pub fn mono() -> Mono {
    Mono(u64::try_from(START.elapsed().as_micros()).unwrap_or(u64::MAX))
}

/// The wall clock.
#[must_use]
pub fn wall() -> WallTime {
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH);
    let micros = match since(SystemTime::now()) {
        Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_micros()).unwrap_or(i64::MAX),
    };
    WallTime(micros)
}

/// A wall time as people and programs read it: RFC 3339 in UTC, to the millisecond.
#[must_use]
pub fn rfc3339(time: WallTime) -> String {
    match jiff::Timestamp::from_microsecond(time.0) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => format!("{} us since 1970", time.0),
    }
}

/// The local time of the week, and what local time is.
#[must_use]
pub fn local() -> (Moment, String) {
    let now = jiff::Zoned::now();
    let weekday = now.weekday().to_monday_zero_offset().unsigned_abs();
    let minute = u16::from(now.hour().unsigned_abs()) * 60 + u16::from(now.minute().unsigned_abs());
    let zone = now.time_zone().iana_name().map_or_else(|| now.offset().to_string(), str::to_owned);
    (Moment { weekday, minute }, zone)
}

/// The zone in which times without one are read and shown beside UTC: that of the node.
#[must_use]
pub fn time_zone() -> jiff::tz::TimeZone {
    jiff::tz::TimeZone::try_system().unwrap_or(jiff::tz::TimeZone::UTC)
}

/// Its name.
#[must_use]
pub fn zone() -> String {
    time_zone().iana_name().unwrap_or("local time").to_owned()
}

/// A wall time in the node's zone, to the millisecond, with its distance to UTC.
#[must_use]
pub fn in_zone(time: WallTime) -> String {
    match jiff::Timestamp::from_microsecond(time.0) {
        Ok(time) => time.to_zoned(time_zone()).strftime("%F %T%.3f %:z").to_string(),
        Err(_) => rfc3339(time),
    }
}

/// Random bytes from the system.
///
/// # Panics
/// When the system has no entropy: nothing of what follows would be safe.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(clippy::expect_used, reason = "without entropy there are no safe keys or ids")]
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    bytes
}

/// A random number from the system.
#[must_use]
pub fn random_u64() -> u64 {
    u64::from_le_bytes(random())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        assert_eq!(rfc3339(WallTime(1_763_690_587_250_000)), "2025-11-21T02:03:07.250Z");
        assert_eq!(rfc3339(WallTime(-1_000)), "1969-12-31T23:59:59.999Z");
    }

    #[test]
    fn the_monotonic_clock_does_not_go_back() {
        let first = mono();
        assert!(mono() >= first);
    }
}
