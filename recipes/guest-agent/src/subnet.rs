//! An interface's address in its subnet, as `192.168.7.10/24` or `fd00::10/64` says it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The address of one host, and how many of its bits are the subnet's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// The host's own address.
    pub address: IpAddr,
    /// The subnet's bits.
    pub prefix: u8,
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            Err(format!(
                "{text:?} is no host's address in a subnet, like 10.0.0.2/24: {why}"
            ))
        };
        let Some((address, prefix)) = text.split_once('/') else {
            return wrong("it has no prefix length");
        };
        let (Ok(address), Ok(prefix)) = (address.parse::<IpAddr>(), prefix.parse::<u8>()) else {
            return wrong("it cannot be read");
        };
        let found = Self { address, prefix };
        if prefix == 0 || prefix > found.width() {
            return wrong("the prefix length is out of range");
        }
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
            return wrong("no interface of a network has such an address");
        }
        if !found.hosts().contains(&found.number()) {
            return wrong("it stands for the whole subnet");
        }
        Ok(found)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl Subnet {
    /// Whether both are in one subnet.
    #[must_use]
    pub fn same_subnet(&self, other: &Self) -> bool {
        self.address.is_ipv4() == other.address.is_ipv4()
            && self.prefix == other.prefix
            && self.number() & self.mask() == other.number() & self.mask()
    }

    /// Whether one of the two is a part of the other.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let mask = self.mask() & other.mask();
        self.address.is_ipv4() == other.address.is_ipv4() && self.number() & mask == other.number() & mask
    }

    /// The first address for a host of the subnet that is not in `taken`; `None` when all are.
    #[must_use]
    pub fn first_free(&self, taken: &[IpAddr]) -> Option<IpAddr> {
        // One more than are taken are enough.
        let mut candidates = self.hosts().take(taken.len() + 1).map(|number| self.address_of(number));
        candidates.find(|address| !taken.contains(address))
    }

    /// The hosts' addresses: without the first, which is the subnet's, and for IPv4 the last, the broadcast; where
    /// there are at most two, all (RFC 3021, RFC 6164).
    fn hosts(&self) -> std::ops::RangeInclusive<u128> {
        let first = self.number() & self.mask();
        let last = first | (!self.mask() & self.all());
        if self.width() - self.prefix <= 1 {
            return first..=last;
        }
        first + 1..=last - u128::from(self.address.is_ipv4())
    }

    fn width(&self) -> u8 {
        if self.address.is_ipv4() { 32 } else { 128 }
    }

    fn all(&self) -> u128 {
        if self.address.is_ipv4() {
            u32::MAX.into()
        } else {
            u128::MAX
        }
    }

    fn mask(&self) -> u128 {
        let host_bits = u32::from(self.width() - self.prefix);
        self.all() & u128::MAX.checked_shl(host_bits).unwrap_or(0)
    }

    fn number(&self) -> u128 {
        match self.address {
            IpAddr::V4(address) => address.to_bits().into(),
            IpAddr::V6(address) => address.to_bits(),
        }
    }

    fn address_of(&self, number: u128) -> IpAddr {
        match self.address {
            IpAddr::V4(_) => IpAddr::from(u32::try_from(number).unwrap_or_default().to_be_bytes()),
            IpAddr::V6(_) => IpAddr::from(number.to_be_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_free_address_is_the_subnets_first_that_nobody_has() {
        let free = |text: &str, taken: &[&str]| {
            let taken: Vec<IpAddr> = taken.iter().map(|address| address.parse().unwrap()).collect();
            subnet(text).first_free(&taken).map(|address| address.to_string())
        };
        assert_eq!(free("10.1.2.30/24", &["10.1.2.30"]).as_deref(), Some("10.1.2.1"));
        assert_eq!(
            free("10.1.2.1/24", &["10.1.2.1", "10.1.2.2"]).as_deref(),
            Some("10.1.2.3")
        );
        assert_eq!(free("10.1.2.130/25", &[]).as_deref(), Some("10.1.2.129"));
        assert_eq!(free("10.1.2.1/30", &["10.1.2.1", "10.1.2.2"]), None);
        assert_eq!(free("10.1.2.5/31", &["10.1.2.5"]).as_deref(), Some("10.1.2.4"));
        assert_eq!(free("10.1.2.5/32", &["10.1.2.5"]), None);
        assert_eq!(free("fd00::5/64", &["fd00::5"]).as_deref(), Some("fd00::1"));
        assert_eq!(free("fd00::5/128", &["fd00::5"]), None);
    }

    #[test]
    fn what_is_no_hosts_address_is_refused() {
        for text in [
            "10.0.0.2",
            "10.0.0.2/",
            "10.0.0.2/33",
            "10.0.0.2/0",
            "10.0.0.0/24",
            "10.0.0.255/24",
            "fd00::/64",
            "x/24",
            "fd00::1/129",
            "127.0.0.2/8",
            "224.0.0.1/24",
            "0.0.0.0/8",
            "::1/64",
            "10.0.0.2/24/3",
        ] {
            let problem = text.parse::<Subnet>().unwrap_err();
            assert!(problem.contains(text), "{problem}");
        }
    }

    #[test]
    fn subnets_are_compared_by_their_bits() {
        assert!(subnet("10.0.0.2/24").same_subnet(&subnet("10.0.0.9/24")));
        assert!(!subnet("10.0.0.2/24").same_subnet(&subnet("10.0.1.2/24")));
        assert!(!subnet("10.0.0.2/24").same_subnet(&subnet("10.0.0.9/16")));
        assert!(subnet("10.0.0.2/24").overlaps(&subnet("10.0.9.9/16")));
        assert!(subnet("10.0.9.9/16").overlaps(&subnet("10.0.0.2/24")));
        assert!(!subnet("10.0.0.2/24").overlaps(&subnet("10.0.1.2/24")));
        assert!(!subnet("fd00::2/64").overlaps(&subnet("10.0.0.2/24")));
        assert!(subnet("fd00::2/64").same_subnet(&subnet("fd00::9/64")));
        assert!(!subnet("fd00::2/64").same_subnet(&subnet("10.0.0.2/24")));
    }
}
