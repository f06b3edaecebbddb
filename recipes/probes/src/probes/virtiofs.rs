//! `virtiofs`: a directory of the host is mounted, read and written; the host compares what was written.

use std::fs::{self, File};
use std::io::Write;

use crate::outcome::{Outcome, Step, ensure};
use crate::sys;

pub fn probe() -> Outcome {
    fs::create_dir("/tmp/share").step("mkdir")?;
    sys::mount("vz-probe", "/tmp/share", "virtiofs", 0, "").step("mount the share vz-probe")?;
    let read = fs::read_to_string("/tmp/share/from-host").step("read the host's file")?;
    ensure(
        read == "written by the host\n",
        "the host's file holds something else than the host wrote",
    )?;
    fs::create_dir("/tmp/share/made").step("make a directory on the share")?;
    let mut file = File::create("/tmp/share/made/draft").step("make a file on the share")?;
    file.write_all(b"written by the guest\n").step("write to the share")?;
    file.sync_all().step("fsync on the share")?;
    fs::rename("/tmp/share/made/draft", "/tmp/share/from-guest").step("rename on the share")?;
    fs::remove_dir("/tmp/share/made").step("remove a directory on the share")?;
    Ok("a share of the host's is read, written, renamed on and removed from".into())
}
