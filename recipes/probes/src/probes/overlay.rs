//! `overlayfs`: a tmpfs over a lower tree: copy-up, whiteouts, and a lower that stays as it was.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::outcome::{Outcome, Step, ensure};
use crate::sys;

pub fn probe() -> Outcome {
    for directory in ["lower", "over", "merged"] {
        fs::create_dir(format!("/tmp/{directory}")).step("mkdir")?;
    }
    fs::create_dir_all("/tmp/lower/tree/deep").step("mkdir")?;
    for (name, content) in [("changed", "old\n"), ("removed", "old\n"), ("tree/deep/file", "old\n")] {
        fs::write(format!("/tmp/lower/{name}"), content).step("write the lower")?;
    }
    sys::mount("tmpfs", "/tmp/over", "tmpfs", 0, "mode=755").step("mount a tmpfs")?;
    fs::create_dir("/tmp/over/upper")
        .and(fs::create_dir("/tmp/over/work"))
        .step("mkdir")?;
    let options = "lowerdir=/tmp/lower,upperdir=/tmp/over/upper,workdir=/tmp/over/work";
    sys::mount("overlay", "/tmp/merged", "overlay", 0, options).step("mount the overlay")?;

    let mut file = OpenOptions::new()
        .append(true)
        .open("/tmp/merged/changed")
        .step("open for copy-up")?;
    file.write_all(b"new\n").step("write through the overlay")?;
    drop(file);
    fs::remove_file("/tmp/merged/removed").step("remove through the overlay")?;
    fs::remove_dir_all("/tmp/merged/tree").step("remove a tree through the overlay")?;
    fs::create_dir("/tmp/merged/tree").step("make the directory again")?;

    let read = |path: &str| fs::read_to_string(path).step(path);
    ensure(
        read("/tmp/merged/changed")? == "old\nnew\n",
        "the merged file is not the changed one",
    )?;
    ensure(
        read("/tmp/over/upper/changed")? == "old\nnew\n",
        "the file was not copied up",
    )?;
    let whiteout = fs::symlink_metadata("/tmp/over/upper/removed").step("the whiteout")?;
    ensure(
        whiteout.file_type().is_char_device() && whiteout.rdev() == 0,
        "a removed file left no whiteout in the upper",
    )?;
    let left = fs::read_dir("/tmp/merged/tree").step("the new directory")?.count();
    ensure(
        left == 0,
        "the new directory shows the removed one's files: it is not opaque",
    )?;
    for name in ["changed", "removed", "tree/deep/file"] {
        ensure(
            read(&format!("/tmp/lower/{name}"))? == "old\n",
            format!("the lower's {name} changed"),
        )?;
    }
    Ok("a tmpfs over a lower: copy-up, whiteout and opaque directory, the lower unchanged".into())
}
