//! Reads a log that another process writes and rotates (the agent's, of a container) and passes on all of it, to its
//! end: when the writer has closed it.
//!
//! `FILE` becomes `FILE.1` when it is full, the one before is dropped, and `FILE` is made anew. Whoever reads slower than
//! that loses whole files, and is told.
//!
//! Out come pieces: the inode of the file that the bytes are from (8 bytes), their offset in it (8), their number (4),
//! all little-endian, then the bytes. A piece without bytes says that something is missing here. The end of the last
//! piece is where a later run goes on, so nothing is lost or repeated when this one is cut off.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

const CHUNK: usize = 16 * 1024;

/// How often, and after which pause, it is looked again for a log that is just being rotated.
const ATTEMPTS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(1);

/// A place in the log: a file and an offset in it.
pub struct Place {
    /// The file's inode, which a tmpfs gives to no second file.
    pub inode: u64,
    /// In bytes.
    pub offset: u64,
}

/// Pass on the log at `path`, from its beginning or from `place`, until its writer has closed it or it is removed.
pub fn follow(path: &Path, place: Option<&Place>, out: &mut impl Write) -> io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    // The directory, and not the file: a watch that is there before the next file is misses nothing of it.
    let changes = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let end = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_DELETE;
    changes.add_watch(directory, end | AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE)?;
    let mut log = Log {
        path,
        older: PathBuf::from(format!("{}.1", path.display())),
        current: None,
        out,
    };
    let mut ended = !is_written(path);
    log.begin(place)?;
    loop {
        log.pass_on()?;
        if ended {
            return Ok(());
        }
        for event in changes.read_events()? {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                ended = !is_written(path);
            }
            ended |= event.mask.intersects(end) && event.name.as_deref() == Some(name);
        }
    }
}

struct Log<'a, W> {
    path: &'a Path,
    older: PathBuf,
    current: Option<Part>,
    out: &'a mut W,
}

struct Part {
    file: File,
    inode: u64,
    offset: u64,
}

impl<W: Write> Log<'_, W> {
    /// Open what is to be read first.
    fn begin(&mut self, place: Option<&Place>) -> io::Result<()> {
        // The older one first: a file that becomes the older one meanwhile is found as such later.
        for path in [&self.older, self.path] {
            if let Some(mut part) = open(path)?
                && place.is_none_or(|place| place.inode == part.inode)
            {
                part.offset = part.file.seek(SeekFrom::Start(place.map_or(0, |place| place.offset)))?;
                self.current = Some(part);
                return Ok(());
            }
        }
        if place.is_some() {
            self.missing()?;
            self.current = open(&self.older)?;
        }
        Ok(())
    }

    /// Pass on all that there is now.
    fn pass_on(&mut self) -> io::Result<()> {
        loop {
            let Some(part) = &mut self.current else {
                self.current = open(self.path)?;
                if self.current.is_none() {
                    return Ok(()); // the next one is being made, or all is gone
                }
                continue;
            };
            copy(part, self.out)?;
            let inode = part.inode;
            let Some(newest) = open(self.path)? else { return Ok(()) };
            if newest.inode == inode {
                return Ok(());
            }
            // Nothing more is written to a file that was renamed, but something may have been before that.
            copy(part, self.out)?;
            let older = open(&self.older)?;
            self.current = match older {
                // Looked at after the newest was opened: so that one is its successor.
                Some(older) if older.inode == inode => Some(newest),
                older => {
                    self.missing()?;
                    older.or(Some(newest))
                }
            };
        }
    }

    fn missing(&mut self) -> io::Result<()> {
        self.out.write_all(&[0; 20])?;
        self.out.flush()
    }
}

fn open(path: &Path) -> io::Result<Option<Part>> {
    match File::open(path) {
        Ok(file) => {
            let inode = file.metadata()?.ino();
            let offset = 0;
            Ok(Some(Part { file, inode, offset }))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn copy(part: &mut Part, out: &mut impl Write) -> io::Result<()> {
    let mut bytes = [0; CHUNK];
    loop {
        let length = part.file.read(&mut bytes)?;
        if length == 0 {
            return Ok(());
        }
        out.write_all(&part.inode.to_le_bytes())?;
        out.write_all(&part.offset.to_le_bytes())?;
        out.write_all(&u32::try_from(length).unwrap_or(0).to_le_bytes())?;
        out.write_all(&bytes[..length])?;
        out.flush()?;
        part.offset += length as u64;
    }
}

/// Whether some process has the log open for writing.
fn is_written(path: &Path) -> bool {
    for _ in 0..ATTEMPTS {
        if let Ok(file) = fs::metadata(path) {
            if is_open_for_writing(&file) {
                return true;
            }
            // Else it became the older one while we looked, and its writer went on to the next.
            if fs::metadata(path).is_ok_and(|now| same(&now, &file)) {
                return false;
            }
        }
        thread::sleep(PAUSE); // between two files there is none
    }
    false
}

fn is_open_for_writing(file: &Metadata) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else {
        return true;
    };
    processes.flatten().any(|process| {
        let open = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        open.filter(|descriptor| fs::metadata(descriptor.path()).is_ok_and(|one| same(&one, file)))
            .any(|descriptor| has_writing_flags(&process.path().join("fdinfo").join(descriptor.file_name())))
    })
}

fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// What proc(5) says of a descriptor has a line `flags:`, with the octal flags of open(2).
fn has_writing_flags(information: &Path) -> bool {
    let text = fs::read_to_string(information).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    flags.is_some_and(|flags| {
        i32::from_str_radix(flags.trim(), 8).is_ok_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::pipe;

    /// The agent's way to write: `bytes` by `bytes`, a new file when one has `limit`.
    struct Writer {
        path: PathBuf,
        file: File,
        size: usize,
        limit: usize,
    }

    impl Writer {
        fn new(path: &Path, limit: usize) -> Self {
            Self {
                path: path.into(),
                file: File::create(path).unwrap(),
                size: 0,
                limit,
            }
        }

        fn write(&mut self, bytes: &[u8]) {
            if self.size + bytes.len() > self.limit {
                fs::rename(&self.path, format!("{}.1", self.path.display())).unwrap();
                (self.file, self.size) = (File::create(&self.path).unwrap(), 0);
            }
            self.file.write_all(bytes).unwrap();
            self.size += bytes.len();
        }
    }

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vz-oci-run-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }

    /// The bytes of the pieces, where the last one ends, and whether something is missing.
    fn read(mut pieces: &[u8]) -> (Vec<u8>, Place, bool) {
        let (mut bytes, mut place, mut missing) = (Vec::new(), Place { inode: 0, offset: 0 }, false);
        while !pieces.is_empty() {
            let (head, rest) = pieces.split_at(20);
            let length = u32::from_le_bytes(head[16..].try_into().unwrap()) as usize;
            if length == 0 {
                missing = true;
            } else {
                place.inode = u64::from_le_bytes(head[..8].try_into().unwrap());
                place.offset = u64::from_le_bytes(head[8..16].try_into().unwrap()) + length as u64;
            }
            bytes.extend(&rest[..length]);
            pieces = &rest[length..];
        }
        (bytes, place, missing)
    }

    fn all(path: &Path, place: Option<&Place>) -> (Vec<u8>, Place, bool) {
        let mut out = Vec::new();
        follow(path, place, &mut out).unwrap();
        read(&out)
    }

    #[test]
    fn a_log_that_is_closed_is_read_to_its_end() {
        let path = directory("closed").join("log");
        let mut writer = Writer::new(&path, 8);
        writer.write(b"one two ");
        writer.write(b"three");
        drop(writer);
        assert_eq!(all(&path, None).0, b"one two three");
    }

    #[test]
    fn what_is_written_meanwhile_comes_through_every_rotation() {
        let path = directory("meanwhile").join("log");
        let mut writer = Writer::new(&path, 64);
        let (mut from, mut to) = pipe().unwrap();
        let followed = path.clone();
        let follower = thread::spawn(move || follow(&followed, None, &mut to));
        let mut wanted = Vec::new();
        let mut came = Vec::new();
        let mut head = [0; 20];
        for number in 0..200 {
            let line = format!("line {number}\n");
            writer.write(line.as_bytes());
            wanted.extend(line.as_bytes());
            // In step with each other, so that nothing may be missing.
            while came.len() < wanted.len() {
                from.read_exact(&mut head).unwrap();
                let length = u32::from_le_bytes(head[16..].try_into().unwrap());
                assert_ne!(length, 0, "something is missing");
                let start = came.len();
                came.resize(start + length as usize, 0);
                from.read_exact(&mut came[start..]).unwrap();
            }
        }
        drop(writer);
        follower.join().unwrap().unwrap();
        assert_eq!(String::from_utf8(came).unwrap(), String::from_utf8(wanted).unwrap());
    }

    #[test]
    fn a_later_run_goes_on_where_the_first_one_ended() {
        let path = directory("later").join("log");
        let mut writer = Writer::new(&path, 8);
        writer.write(b"first");
        let kept = fs::read(&path).unwrap();
        let place = Place {
            inode: fs::metadata(&path).unwrap().ino(),
            offset: kept.len() as u64,
        };
        writer.write(b", second");
        drop(writer);
        let (bytes, place, missing) = all(&path, Some(&place));
        assert_eq!((&bytes[..], missing), (&b", second"[..], false));
        assert_eq!(all(&path, Some(&place)).0, b"");
    }

    #[test]
    fn files_that_are_gone_are_told_as_missing() {
        let path = directory("gone").join("log");
        let mut writer = Writer::new(&path, 4);
        writer.write(b"aaaa");
        let first = File::open(&path).unwrap(); // or another file gets its inode, on other file systems than tmpfs
        let place = Place {
            inode: first.metadata().unwrap().ino(),
            offset: 2,
        };
        for part in [b"bbbb", b"cccc", b"dddd"] {
            writer.write(part);
        }
        drop(writer);
        let (bytes, _, missing) = all(&path, Some(&place));
        assert_eq!((&bytes[..], missing), (&b"ccccdddd"[..], true));
    }

    #[test]
    fn a_log_that_is_removed_has_ended() {
        let place = directory("removed");
        let path = place.join("log");
        let mut writer = Writer::new(&path, 4);
        let (mut from, mut to) = pipe().unwrap();
        let follower = thread::spawn(move || follow(&path, None, &mut to));
        writer.write(b"here");
        from.read_exact(&mut [0; 24]).unwrap();
        fs::remove_dir_all(&place).unwrap();
        follower.join().unwrap().unwrap();
        drop(writer);
    }
}
