//! The guest's clock, which is set when the host's answer to the ready line shows that it is off.
//!
//! A guest with a real-time clock starts with the right time and nothing happens; one without starts in 1970.

use std::io;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// Less than this is not corrected: a clock that jumps is worse than one that is a little off.
const TOLERATED: Duration = Duration::from_secs(1);

/// The host's time as its answer told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTime {
    /// Since 1970, at some moment while the answer was on its way.
    since_epoch: Duration,
    /// How long the answer took: what the time above may be off by.
    took: Duration,
}

impl HostTime {
    /// Reads `time <seconds since 1970>[.<fraction>]`; `None` for anything else.
    #[must_use]
    pub fn parse(line: &str, took: Duration) -> Option<Self> {
        let number = line.strip_prefix("time ")?.trim_end();
        let (seconds, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(seconds) || !digits(fraction) {
            return None;
        }
        let nanos = format!("{fraction:0<9}")[..9].parse().ok()?;
        let since_epoch = Duration::new(seconds.parse().ok()?, nanos);
        Some(Self { since_epoch, took })
    }

    /// Sets the guest's clock when it is off by more than a second beyond doubt. True when it was set.
    ///
    /// # Errors
    /// What the kernel says; only root may do this.
    pub fn set(self) -> io::Result<bool> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
        match self.correct(now) {
            None => Ok(false),
            Some(right) => clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(right))
                .map(|()| true)
                .map_err(io::Error::from),
        }
    }

    /// The time to set a clock to that shows `now`, if at all.
    fn correct(self, now: Duration) -> Option<Duration> {
        // As likely on the way there as on the way back.
        let right = self.since_epoch + self.took / 2;
        (right.abs_diff(now) > TOLERATED + self.took).then_some(right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_line_tells_the_time_and_nothing_else_does() {
        let time = |line| HostTime::parse(line, SECOND).map(|time| time.since_epoch);
        assert_eq!(
            time("time 1700000000.25\n"),
            Some(Duration::new(1_700_000_000, 250_000_000))
        );
        assert_eq!(time("time 1700000000"), Some(Duration::new(1_700_000_000, 0)));
        assert_eq!(time("time 1.123456789987\n"), Some(Duration::new(1, 123_456_789)));
        for line in [
            "", "time", "time ", "time x", "time -1", "time 1.", "time .5", "time 1.x", "time +1", "ok 1", "time 1 2",
        ] {
            assert_eq!(time(line), None, "{line:?}");
        }
        assert_eq!(time("time 99999999999999999999999"), None);
    }

    #[test]
    fn only_a_clock_that_is_surely_off_is_set() {
        let host = HostTime::parse("time 1000.0", SECOND * 4).unwrap();
        assert_eq!(host.correct(Duration::ZERO), Some(SECOND * 1002));
        assert_eq!(host.correct(SECOND * 5000), Some(SECOND * 1002));
        // The answer took 4 s: up to 5 s prove nothing.
        assert_eq!(host.correct(SECOND * 997), None);
        assert_eq!(host.correct(SECOND * 1007), None);
        assert_eq!(host.correct(SECOND * 996), Some(SECOND * 1002));
    }
}
