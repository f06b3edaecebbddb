//! `container_sandbox`: youki runs a container with namespaces, limits and a filter, and each of them holds; a cgroup can
//! be denied devices.

use std::fs;
use std::process::{Command, Stdio};

use crate::outcome::{Failure, Outcome, Step, ensure};
use crate::probes::devices;

/// Where hosts put the runtime of the bundle: the share `oci-runtime-bin`.
const RUNTIME: &str = "/run/vz-oci/bin/youki";
const BUNDLE: &str = "/tmp/bundle";

/// An OCI runtime configuration (version 1.0.2): every namespace of its own but the user's, 48 MiB, 24 processes, half
/// a processor, no capability, a filter that denies `mkdirat`, a root that cannot be written.
const CONFIG: &str = include_str!("container.json");

/// What the container says of itself, line by line.
const EXPECTED: &str = "\
pid 1
host box
user 1000:1000
cgroup 0::/
interfaces lo
memory.max 50331648
pids.max 24
cpu.max 50000 100000
CapEff: 0000000000000000
NoNewPrivs: 1
Seccomp: 2
mkdir: Operation not permitted
root: Read-only file system
null: open
memory: killed
";

pub fn probe() -> Outcome {
    // youki could set it up as well, but ours is built without.
    devices::probe()?;
    fs::create_dir_all(format!("{BUNDLE}/rootfs/bin")).step("mkdir")?;
    for directory in ["dev", "proc", "sys", "tmp"] {
        fs::create_dir(format!("{BUNDLE}/rootfs/{directory}")).step("mkdir")?;
    }
    fs::copy("/bin/busybox", format!("{BUNDLE}/rootfs/bin/busybox")).step("copy busybox")?;
    fs::write(format!("{BUNDLE}/rootfs/probe"), include_str!("container.sh")).step("write the container's script")?;
    fs::write(format!("{BUNDLE}/config.json"), CONFIG).step("write config.json")?;
    let run = Command::new(RUNTIME)
        .args(["--root", "/tmp/youki", "run", "--bundle", BUNDLE, "vz-probe"])
        .stdin(Stdio::null())
        .output()
        .step(RUNTIME)?;
    let said = String::from_utf8_lossy(&run.stdout);
    if !run.status.success() {
        let errors = String::from_utf8_lossy(&run.stderr);
        let last = errors
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it said nothing");
        let reached = said.lines().last().unwrap_or("nothing");
        let status = run.status;
        return Err(Failure::new(format!(
            "youki run: {status}: {last}; the container last said: {reached}"
        )));
    }
    for (found, wanted) in said.lines().zip(EXPECTED.lines()) {
        ensure(
            found == wanted,
            format!("inside the container: {found:?}, wanted {wanted:?}"),
        )?;
    }
    ensure(said == EXPECTED, "the container's script did not come to its end")?;
    Ok(
        "youki runs a container; namespaces, limits, capabilities and system call filter hold; so does a device filter"
            .into(),
    )
}
