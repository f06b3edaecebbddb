//! The guest's clock, which is set when the host's answer to the ready line shows that it is off, and moved on when the
//! machine's real-time clock shows that the guest stood still: it was saved and restored, or its host slept.
//!
//! A guest with a real-time clock starts with the right time and nothing happens; one without starts in 1970.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::sys::time::{TimeSpec, TimeValLike};
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

const SECOND: i64 = 1_000_000_000;

/// What is known to this many nanoseconds is not measured again.
const SHARP: i64 = SECOND / 20;

/// How far the time of day is from the real-time clock at most when all that is known of that goes back to readings of
/// whole seconds: the kernel's at the start, the first one here and one after the guest stood still, nanoseconds.
const GUESSED: i64 = SECOND / 2 * 3 + SHARP;

/// Between two readings while a tick is waited for.
const BETWEEN: Duration = Duration::from_millis(10);

/// Ticks that are waited for at most, on a guest that is not scheduled in time for a sharp one.
const TICKS: usize = 3;

/// `_IOR('p', 0x09, struct rtc_time)` of linux/rtc.h.
const RTC_RD_TIME: libc::c_ulong = 0x8024_7009;

/// How the real-time clock, which goes on while a guest stands still, and the guest's monotonic clock, which does not,
/// lie to each other. Neither can be set, so whoever sets the time of day changes nothing here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// The real-time clock less the monotonic one, nanoseconds.
    offset: i64,
    /// How far `offset` may be from the truth, nanoseconds: the real-time clock shows whole seconds.
    doubt: i64,
    /// Whether `offset` goes back to a tick.
    seen: bool,
}

impl Pace {
    /// What a single reading tells: to half a second.
    ///
    /// # Errors
    /// When there is no real-time clock that can be read.
    pub fn roughly() -> io::Result<Self> {
        Ok(Self {
            offset: real_time_clock()? + SECOND / 2 - monotonic()?,
            doubt: SECOND / 2,
            seen: false,
        })
    }

    /// Whether nothing is to be learnt from a tick.
    #[must_use]
    pub fn is_sharp(&self) -> bool {
        self.doubt <= SHARP
    }

    /// Moves the time of day on by what the guest has missed, and says by how many seconds; `None` when that is less
    /// than one reading can show, a second. The clock is then off by half a second more than before it stood still at
    /// most, which `learn` makes up for.
    ///
    /// # Errors
    /// When the clocks cannot be read or set.
    pub fn catch_up(&mut self) -> io::Result<Option<i64>> {
        let Some(missed) = self.missed(real_time_clock()?, monotonic()?) else {
            return Ok(None);
        };
        move_by(missed)?;
        self.offset += missed;
        self.doubt += SECOND / 2;
        Ok(Some(missed.div_euclid(SECOND)))
    }

    /// Takes what a tick showed where that tells more than was known, and moves the time of day by what `catch_up`
    /// could not see.
    ///
    /// # Errors
    /// When the clock cannot be read or set.
    pub fn learn(&mut self, tick: Tick) -> io::Result<()> {
        if tick.doubt >= self.doubt {
            return Ok(());
        }
        let wrong = clock_gettime(ClockId::CLOCK_REALTIME)?.num_nanoseconds() - monotonic()? - tick.offset;
        let missing = self.missing(tick.offset, wrong);
        if missing != 0 {
            move_by(missing)?;
        }
        *self = Self {
            offset: tick.offset,
            doubt: tick.doubt.max(SHARP),
            seen: true,
        };
        Ok(())
    }

    /// Nanoseconds that the time of day has to be moved on by, when a tick shows `offset` and the time of day is
    /// `wrong` by that.
    fn missing(self, offset: i64, wrong: i64) -> i64 {
        if self.seen {
            return offset - self.offset;
        }
        // How far off the time of day was before the first tick is not known, and may be what somebody wants. But a
        // guest that stood still before it was moved on by a guess; together with the kernel's own, half a second at
        // the start, no more than `GUESSED` comes of that.
        let guessed = self.doubt > SECOND / 2 && wrong.abs() <= GUESSED;
        if guessed { -wrong } else { 0 }
    }

    /// Nanoseconds that the real-time clock, which shows `shown`, has gone on without the guest; `None` for none that
    /// are beyond doubt.
    fn missed(self, shown: i64, monotonic: i64) -> Option<i64> {
        // It is up to a second later than what is shown.
        let least = shown - monotonic - self.offset;
        let none = -SECOND - self.doubt..=self.doubt;
        (!none.contains(&least)).then_some(least + SECOND / 2)
    }
}

/// The real-time clock less the monotonic one, as a tick of the first showed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Nanoseconds.
    offset: i64,
    /// How far `offset` may be from the truth, nanoseconds: half of what lay between the two readings.
    doubt: i64,
}

/// Waits for a tick of the real-time clock, at most three seconds: the first sharp one, else the best of all.
///
/// # Errors
/// When the clocks cannot be read.
pub fn tick() -> io::Result<Tick> {
    let mut best = next_tick()?;
    for _ in 1..TICKS {
        if best.doubt <= SHARP {
            break;
        }
        let other = next_tick()?;
        if other.doubt < best.doubt {
            best = other;
        }
    }
    Ok(best)
}

fn next_tick() -> io::Result<Tick> {
    let first = real_time_clock()?;
    let mut before = monotonic()?;
    loop {
        thread::sleep(BETWEEN);
        let (shown, after) = (real_time_clock()?, monotonic()?);
        if shown != first {
            return Ok(Tick {
                offset: shown - before.midpoint(after),
                doubt: (after - before) / 2,
            });
        }
        before = after;
    }
}

fn monotonic() -> io::Result<i64> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.num_nanoseconds())
}

fn move_by(nanos: i64) -> io::Result<()> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?.num_nanoseconds();
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::nanoseconds(now + nanos)).map_err(io::Error::from)
}

/// What the machine's real-time clock shows, in nanoseconds since 1970, whole seconds of them.
fn real_time_clock() -> io::Result<i64> {
    let clock = File::open("/dev/rtc0")?;
    let mut time = [0i32; 9]; // struct rtc_time: seconds, minutes, hours, day from 1, month from 0, years since 1900 …
    // Sound: the request fills nine ints.
    if unsafe { libc::ioctl(clock.as_raw_fd(), RTC_RD_TIME as libc::Ioctl, time.as_mut_ptr()) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(since_epoch(&time.map(i64::from)) * SECOND)
}

/// Seconds since 1970 of a time as the kernel takes it apart, in the Gregorian calendar.
fn since_epoch(&[second, minute, hour, day, month, year, ..]: &[i64; 9]) -> i64 {
    // Years that begin in March have their odd day at their end.
    let (year, month) = if month < 2 {
        (year + 1899, month + 10)
    } else {
        (year + 1900, month - 2)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    ((days * 24 + hour) * 60 + minute) * 60 + second
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Duration = Duration::from_secs(1);

    #[test]
    fn a_line_tells_the_time_and_nothing_else_does() {
        let time = |line| HostTime::parse(line, ONE).map(|time| time.since_epoch);
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
        let host = HostTime::parse("time 1000.0", ONE * 4).unwrap();
        assert_eq!(host.correct(Duration::ZERO), Some(ONE * 1002));
        assert_eq!(host.correct(ONE * 5000), Some(ONE * 1002));
        // The answer took 4 s: up to 5 s prove nothing.
        assert_eq!(host.correct(ONE * 997), None);
        assert_eq!(host.correct(ONE * 1007), None);
        assert_eq!(host.correct(ONE * 996), Some(ONE * 1002));
    }

    #[test]
    fn a_date_is_so_many_seconds_since_1970() {
        for (time, seconds) in [
            ([0, 0, 0, 1, 0, 70, 0, 0, 0], 0),
            ([59, 59, 23, 31, 11, 99, 0, 0, 0], 946_684_799),
            ([0, 0, 0, 29, 1, 100, 0, 0, 0], 951_782_400),
            ([40, 46, 1, 9, 8, 101, 0, 0, 0], 1_000_000_000),
            ([0, 0, 0, 1, 2, 200, 0, 0, 0], 4_107_542_400),
        ] {
            assert_eq!(since_epoch(&time), seconds, "{time:?}");
        }
    }

    #[test]
    fn only_what_is_beyond_doubt_was_missed() {
        let (offset, doubt) = (1_000 * SECOND, SHARP);
        let pace = Pace {
            offset,
            doubt,
            seen: true,
        };
        // 7.3 s after the start a clock that shows whole seconds shows 1007, a moment later or before it as well 1008.
        let monotonic = 73 * SECOND / 10;
        assert_eq!(pace.missed(1_007 * SECOND, monotonic), None);
        assert_eq!(pace.missed(1_006 * SECOND, monotonic - SECOND / 3), None);
        // The time is between 1010 and 1011: 2.7 to 3.7 s went by unseen.
        assert_eq!(pace.missed(1_010 * SECOND, monotonic), Some(32 * SECOND / 10));
        assert_eq!(pace.missed(1_008 * SECOND, monotonic), Some(12 * SECOND / 10));
        // A clock that was set back is followed as well.
        assert_eq!(pace.missed(1_005 * SECOND, monotonic), Some(-18 * SECOND / 10));
        // What is known to half a second only proves less.
        let pace = Pace {
            doubt: SECOND / 2,
            ..pace
        };
        assert_eq!(pace.missed(1_007 * SECOND, monotonic - SECOND / 10), None);
        assert_eq!(pace.missed(1_008 * SECOND, monotonic), Some(12 * SECOND / 10));
    }
    #[test]
    fn a_guest_that_stood_still_before_the_first_tick_is_set_right_by_it() {
        let told = Pace {
            offset: 1_000 * SECOND,
            doubt: SECOND / 2,
            seen: false,
        };
        let (tick, wrong) = (1_007 * SECOND, 13 * SECOND / 10);
        // What was never moved by a guess is left alone, however wrong it is.
        assert_eq!(told.missing(tick, wrong), 0);
        let guessed = Pace { doubt: SECOND, ..told };
        assert_eq!(guessed.missing(tick, wrong), -wrong);
        assert_eq!(guessed.missing(tick, -wrong), wrong);
        // So is a time that somebody set.
        assert_eq!(guessed.missing(tick, 3_600 * SECOND), 0);
        // After a tick it is known to the hundredth, whatever the time of day says.
        let seen = Pace { seen: true, ..guessed };
        assert_eq!(seen.missing(tick, 3_600 * SECOND), 7 * SECOND);
    }
}
