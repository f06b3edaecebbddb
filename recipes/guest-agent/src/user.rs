//! Who runs a command: a user found in the guest's own `/etc/passwd` and `/etc/group`.
//!
//! The files are read here because a static glibc cannot load the name services that `getpwnam` asks.

use std::fs;
use std::io;
use std::path::Path;

use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

/// passwd(5): the login shell of an entry that names none.
const SHELL: &str = "/bin/sh";

/// A user with all that the kernel and a program's environment want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's name, or the number in digits when no name is known.
    pub name: String,
    /// The user's number.
    pub uid: u32,
    /// The primary group's number.
    pub gid: u32,
    /// All other groups' numbers.
    pub groups: Vec<u32>,
    /// The home directory, `/` when none is known.
    pub home: String,
    /// The login shell, `/bin/sh` when none is known.
    pub shell: String,
}

impl User {
    /// Finds `wanted`: a name or a number, with `:group` (again name or number) for another primary group. Empty
    /// is root. A number needs no entry.
    ///
    /// # Errors
    /// A sentence that names the user or group that does not exist.
    pub fn find(wanted: &str) -> Result<Self, String> {
        let read = |path: &str| match fs::read_to_string(Path::new(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            other => other.map_err(|error| format!("{path} cannot be read: {error}")),
        };
        Self::find_in(wanted, &read("/etc/passwd")?, &read("/etc/group")?)
    }

    /// Finds `wanted` as [`User::find`] does, in the text of these two files.
    ///
    /// # Errors
    /// As there.
    pub fn find_in(wanted: &str, passwd: &str, group: &str) -> Result<Self, String> {
        let (user, wanted_group) = match wanted.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (wanted, None),
        };
        let user = if user.is_empty() { "root" } else { user };
        let mut found = passwd
            .lines()
            .filter_map(Self::parse)
            .find(|entry| entry.name == user || entry.uid.to_string() == user)
            .or_else(|| Self::nameless(user))
            .ok_or_else(|| format!("there is no user {user:?} in the guest"))?;
        found.groups = groups(group)
            .filter(|(_, _, members)| members.split(',').any(|member| member == found.name))
            .map(|(_, gid, _)| gid)
            .collect();
        if let Some(wanted) = wanted_group {
            found.gid = groups(group)
                .find(|(name, gid, _)| *name == wanted || gid.to_string() == wanted)
                .map(|(_, gid, _)| gid)
                .or_else(|| wanted.parse().ok())
                .ok_or_else(|| format!("there is no group {wanted:?} in the guest"))?;
        }
        Ok(found)
    }

    /// One line of passwd(5): `name:password:uid:gid:comment:home:shell`.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else {
            return None;
        };
        Some(Self {
            name: name.into(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            groups: Vec::new(),
            home: if home.is_empty() { "/" } else { home }.into(),
            shell: if shell.is_empty() { SHELL } else { shell }.into(),
        })
    }

    fn nameless(number: &str) -> Option<Self> {
        let uid: u32 = if number == "root" { 0 } else { number.parse().ok()? };
        Some(Self {
            name: if uid == 0 { "root" } else { number }.into(),
            uid,
            gid: uid,
            groups: Vec::new(),
            home: "/".into(),
            shell: SHELL.into(),
        })
    }

    /// What makes a process this user, for good, when it is called between fork and exec.
    ///
    /// The returned function fails with what the kernel says, and then has undone nothing.
    pub fn assume(&self) -> impl FnMut() -> io::Result<()> + Send + Sync + 'static {
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        move || {
            // The user comes last: afterwards the right to change groups is gone.
            setgroups(&groups)?;
            setgid(gid)?;
            setuid(uid)?;
            Ok(())
        }
    }
}

/// The lines of group(5), `name:password:gid:members`, as name, number, members.
fn groups(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, gid, members] = fields[..] else {
            return None;
        };
        Some((name, gid.parse().ok()?, members))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken line\nann:x:1000:1001::/home/ann:/bin/bash\nbin:x:2:2:::\n";
    const GROUP: &str = "root:x:0:\nann:x:1001:\ndisk:x:6:bob,ann\nkvm:x:7:anna\n";

    fn find(wanted: &str) -> Result<User, String> {
        User::find_in(wanted, PASSWD, GROUP)
    }

    #[test]
    fn empty_is_root() {
        let root = find("").unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
    }

    #[test]
    fn a_name_brings_its_groups_and_its_home() {
        let ann = find("ann").unwrap();
        assert_eq!((ann.uid, ann.gid, ann.home.as_str()), (1000, 1001, "/home/ann"));
        assert_eq!(ann.shell, "/bin/bash");
        assert_eq!(ann.groups, [6]);
        assert_eq!(find("1000").unwrap(), ann);
    }

    #[test]
    fn a_group_may_be_asked_for() {
        assert_eq!(find("ann:disk").unwrap().gid, 6);
        assert_eq!(find("ann:4242").unwrap().gid, 4242);
        assert!(find("ann:nobody").unwrap_err().contains("nobody"));
    }

    #[test]
    fn a_number_needs_no_entry_and_a_name_does() {
        let nobody = find("4711").unwrap();
        assert_eq!((nobody.uid, nobody.gid, nobody.home.as_str()), (4711, 4711, "/"));
        assert!(find("bob").unwrap_err().contains("bob"));
    }

    #[test]
    fn what_an_entry_leaves_out_is_the_usual() {
        for wanted in ["bin", "4711"] {
            let user = find(wanted).unwrap();
            assert_eq!((user.home.as_str(), user.shell.as_str()), ("/", "/bin/sh"));
        }
    }

    #[test]
    fn a_guest_without_passwd_has_root() {
        for wanted in ["", "root", "0"] {
            let root = User::find_in(wanted, "", "").unwrap();
            assert_eq!((root.name.as_str(), root.uid, root.home.as_str()), ("root", 0, "/"));
        }
    }
}
