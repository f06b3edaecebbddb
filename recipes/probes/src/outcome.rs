//! What a probe finds out: proven with a sentence, failed, or inconclusive.

use std::fmt::Display;

/// The sentence of a probe that proved its capability; it says what was done, and holds no time, number or address
/// that could differ in the next boot.
pub type Outcome = Result<String, Failure>;

/// Finds out about one capability.
pub type Probe = fn() -> Outcome;

/// Why a capability is not proven.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// The capability is not there.
    Failed(String),
    /// The machine lacks what the probe needs; nothing is known about the kernel.
    Inconclusive(String),
}

impl Failure {
    /// A failure with this sentence.
    pub fn new(sentence: impl Into<String>) -> Self {
        Self::Failed(sentence.into())
    }
}

/// Gives an error the step that it came from.
pub trait Step<T> {
    /// The value, or `what: error` as the reason of a failure.
    fn step(self, what: &str) -> Result<T, Failure>;
}

impl<T, E: Display> Step<T> for Result<T, E> {
    fn step(self, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(format!("{what}: {error}")))
    }
}

/// `sentence` as a failure unless `holds`.
pub fn ensure(holds: bool, sentence: impl Into<String>) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::new(sentence)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_step_is_named() {
        let failed: Result<(), _> = Err("no").step("mount");
        assert_eq!(failed, Err(Failure::Failed("mount: no".into())));
        assert_eq!(ensure(false, "2 is not 3"), Err(Failure::Failed("2 is not 3".into())));
        assert_eq!(ensure(true, "never"), Ok(()));
    }
}
