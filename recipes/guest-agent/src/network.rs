//! `NetworkService`: a bridge for each network of a stack, and for each of its services a network namespace on one.
//!
//! A service's namespace is `/run/netns/<stack>-<service>`, as `ip netns` names them, with `lo` and one end of a veth
//! pair, `eth0`. The other end is a port of the bridge, which has an address as well: the gateway. What was set up
//! is recorded in [`STATE`], one file a service, written before and removed after what it stands for; so it outlives
//! the agent, and nothing that is half there is forgotten.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use crate::idempotency::Answers;
use crate::netlink::{Netlink, index};
use crate::proto::network_service_server::NetworkService;
use crate::proto::{NetworkSetupRequest, NetworkSetupResponse, NetworkTeardownRequest, NetworkTeardownResponse};
use crate::subnet::Subnet;

/// A directory for each stack, in it a file for each service.
const STATE: &str = "/run/vz/network";

/// Where named network namespaces are (ip-netns(8)).
const NAMESPACES: &str = "/run/netns";

/// The service.
pub struct Network {
    /// One call at a time: bridges are shared.
    busy: Arc<Mutex<()>>,
    answers: Answers,
}

impl Network {
    /// Repeated calls get theirs of `answers`.
    #[must_use]
    pub fn new(answers: Answers) -> Self {
        Self {
            busy: Arc::default(),
            answers,
        }
    }
}

#[tonic::async_trait]
impl NetworkService for Network {
    async fn setup(&self, request: Request<NetworkSetupRequest>) -> Result<Response<NetworkSetupResponse>, Status> {
        let busy = self.busy.clone();
        let call = |request: NetworkSetupRequest| {
            on_a_thread(busy, move || {
                set_up(&request)?;
                Ok(NetworkSetupResponse {})
            })
        };
        self.answers
            .once("NetworkService.Setup", request.into_inner(), call)
            .await
    }

    async fn teardown(
        &self,
        request: Request<NetworkTeardownRequest>,
    ) -> Result<Response<NetworkTeardownResponse>, Status> {
        let busy = self.busy.clone();
        let call = |request: NetworkTeardownRequest| {
            on_a_thread(busy, move || {
                tear_down(&request)?;
                Ok(NetworkTeardownResponse {})
            })
        };
        self.answers
            .once("NetworkService.Teardown", request.into_inner(), call)
            .await
    }
}

/// Does `work` on a thread of its own, since a thread that changes its network namespace is good for nothing else, and
/// to its end, whatever the client does.
async fn on_a_thread<T: Send + 'static>(
    busy: Arc<Mutex<()>>,
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let (sender, receiver) = oneshot::channel();
    let worker = std::thread::Builder::new().spawn(move || {
        let _held = busy.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = sender.send(work());
    });
    worker.map_err(|error| Status::internal(format!("no thread can be started: {error}")))?;
    receiver
        .await
        .unwrap_or_else(|_| Err(Status::internal("the call ended without an answer")))
}

/// A service as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Service {
    stack: String,
    name: String,
    subnet: Subnet,
    network: String,
    /// The bridge's address in the subnet; `None` when the subnet has no room for one.
    gateway: Option<IpAddr>,
}

impl Service {
    fn record(&self) -> PathBuf {
        Path::new(STATE).join(&self.stack).join(&self.name)
    }

    fn namespace(&self) -> PathBuf {
        Path::new(NAMESPACES).join(format!("{}-{}", self.stack, self.name))
    }

    /// The interface's name at the bridge. Names have at most 15 bytes.
    fn port(&self) -> String {
        short("vzp", &[&self.stack, &self.name])
    }

    fn bridge(&self) -> String {
        short("vzb", &[&self.stack, &self.network])
    }

    fn text(&self) -> String {
        let gateway = self.gateway.map(|address| address.to_string()).unwrap_or_default();
        format!("{}\n{gateway}\n{}\n", self.subnet, self.network)
    }

    fn parse(stack: &str, name: &str, text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let (subnet, gateway, network) = (lines.next()?.parse().ok()?, lines.next()?, lines.next()?);
        let gateway = if gateway.is_empty() {
            None
        } else {
            Some(gateway.parse().ok()?)
        };
        Some(Self {
            stack: stack.to_owned(),
            name: name.to_owned(),
            subnet,
            network: network.to_owned(),
            gateway,
        })
    }

    fn is_there(&self) -> bool {
        index(&self.port()).is_some() && index(&self.bridge()).is_some() && is_namespace(&self.namespace())
    }
}

/// `prefix` and 48 bits of a hash of `words`.
fn short(prefix: &str, words: &[&str]) -> String {
    let mut hasher = DefaultHasher::new();
    words.hash(&mut hasher);
    format!("{prefix}{:012x}", hasher.finish() >> 16)
}

/// A locally administered address of one interface (IEEE 802: the second bit of the first byte), from its name.
fn ethernet(name: &str) -> [u8; 6] {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let mut address = [2; 6];
    address[1..].copy_from_slice(&hasher.finish().to_ne_bytes()[..5]);
    address
}

/// Whether a network namespace is bound to the file.
fn is_namespace(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

fn set_up(request: &NetworkSetupRequest) -> Result<(), Status> {
    let stack = plain("stack_id", &request.stack_id)?;
    let mut known = recorded(stack)?;
    let mut wanted = Vec::new();
    for service in &request.services {
        let name = plain("a service's name", &service.name)?;
        let subnet: Subnet = service.addr.parse().map_err(Status::invalid_argument)?;
        if service.network_name.len() > 255 || service.network_name.contains('\n') {
            return Err(Status::invalid_argument(format!(
                "{:?} cannot name a network: it is too long, or more than a line",
                service.network_name
            )));
        }
        wanted.push(Service {
            stack: stack.to_owned(),
            name: name.to_owned(),
            subnet,
            network: service.network_name.clone(),
            gateway: None,
        });
    }
    // All is checked before anything is made.
    for (number, service) in wanted.iter().enumerate() {
        let name = &service.name;
        if wanted[..number].iter().any(|other| other.name == *name) {
            return Err(Status::invalid_argument(format!("service {name:?} is named twice")));
        }
        if let Some(other) = known.iter().find(|other| other.name == *name) {
            if (other.subnet, &other.network) != (service.subnet, &service.network) {
                return Err(Status::already_exists(format!(
                    "service {name:?} of stack {stack:?} is set up as {} in network {:?}; tear it down first",
                    other.subnet, other.network
                )));
            }
        } else if is_namespace(&service.namespace()) {
            return Err(Status::already_exists(format!(
                "{} is there already, and is not service {name:?} of stack {stack:?}",
                service.namespace().display()
            )));
        }
        let mut others = known
            .iter()
            .chain(&wanted[..number])
            .filter(|other| other.name != *name);
        let taken = others.find(|other| {
            other.network == service.network
                && (other.subnet.address == service.subnet.address || other.gateway == Some(service.subnet.address))
        });
        if let Some(other) = taken {
            return Err(Status::invalid_argument(format!(
                "the address {} of service {name:?} is taken in network {:?}, by service {:?} or its gateway",
                service.subnet.address, service.network, other.name
            )));
        }
    }
    let addresses: Vec<(String, IpAddr)> = wanted
        .iter()
        .chain(&known)
        .map(|service| (service.network.clone(), service.subnet.address))
        .collect();
    let mut made = Vec::new();
    for mut service in wanted {
        if let Some(other) = known.iter().find(|other| other.name == service.name) {
            service = other.clone();
            if service.is_there() {
                continue;
            }
        } else {
            service.gateway = gateway(&service, &known, &addresses);
            known.push(service.clone());
        }
        made.push(service);
        let service = &made[made.len() - 1];
        if let Err(error) = make(service) {
            let sentence = format!(
                "service {:?} of stack {stack:?} cannot be given its network: {error}; nothing of the call is left",
                service.name
            );
            for service in made.iter().rev() {
                let _ = remove(service);
            }
            return Err(Status::internal(sentence));
        }
    }
    Ok(())
}

/// The bridge's address for a service: the one it has in the subnet, else the first that no service has or wants.
fn gateway(service: &Service, known: &[Service], addresses: &[(String, IpAddr)]) -> Option<IpAddr> {
    let mut neighbours = known
        .iter()
        .filter(|other| other.network == service.network && other.subnet.same_subnet(&service.subnet));
    if let Some(neighbour) = neighbours.next() {
        return neighbour.gateway;
    }
    let taken: Vec<IpAddr> = addresses
        .iter()
        .filter(|(network, _)| *network == service.network)
        .map(|(_, address)| *address)
        .collect();
    service.subnet.first_free(&taken)
}

fn tear_down(request: &NetworkTeardownRequest) -> Result<(), Status> {
    let stack = plain("stack_id", &request.stack_id)?;
    for name in &request.service_names {
        plain("a service's name", name)?;
    }
    let names = &request.service_names;
    for service in recorded(stack)? {
        if names.is_empty() || names.contains(&service.name) {
            remove(&service).map_err(|error| {
                Status::internal(format!(
                    "the network of service {:?} of stack {stack:?} cannot be removed: {error}",
                    service.name
                ))
            })?;
        }
    }
    Ok(())
}

/// A name that is part of a file's name.
fn plain<'a>(what: &str, name: &'a str) -> Result<&'a str, Status> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(Status::invalid_argument(format!(
            "{what} is 1 to 100 letters, digits and _-. with no dot in front, not {name:?}"
        )));
    }
    Ok(name)
}

/// All services of a stack that are set up, or half so.
fn recorded(stack: &str) -> Result<Vec<Service>, Status> {
    let directory = Path::new(STATE).join(stack);
    let read = || {
        let mut found = Vec::new();
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            found.extend(Service::parse(stack, &name, &fs::read_to_string(entry.path())?));
        }
        found.sort_by(|a: &Service, b| a.name.cmp(&b.name));
        Ok(found)
    };
    read().map_err(|error: io::Error| Status::internal(format!("{} cannot be read: {error}", directory.display())))
}

/// Makes what a service stands for. What an earlier try left half-way is removed first.
fn make(service: &Service) -> io::Result<()> {
    let netlink = Netlink::open()?;
    let record = service.record();
    netlink.remove(&service.port())?;
    unbind(&service.namespace())?;
    if let Some(directory) = record.parent() {
        fs::create_dir_all(directory)?;
    }
    // Whole or not at all, also when the agent is killed here.
    let draft = Path::new(STATE).join(".draft");
    fs::write(&draft, service.text())?;
    fs::rename(&draft, &record)?;

    let bridge = service.bridge();
    if index(&bridge).is_none() {
        netlink.add_bridge(&bridge, ethernet(&bridge))?;
    }
    let bridge = index(&bridge).ok_or_else(|| io::Error::other("the bridge is gone again"))?;
    if let Some(gateway) = service.gateway {
        match netlink.add_address(bridge, gateway, service.subnet.prefix) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    netlink.up(bridge)?;

    let home = namespace_of_this_thread()?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    let namespace = (|| {
        bind(&service.namespace())?;
        namespace_of_this_thread()
    })();
    setns(&home, CloneFlags::CLONE_NEWNET)?;
    let namespace = namespace?;
    let port = service.port();
    netlink.add_veth(&port, bridge, "eth0", namespace.as_fd())?;
    netlink.up(index(&port).ok_or_else(|| io::Error::other("the interface is gone again"))?)?;

    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
    let configured = configure(service);
    setns(&home, CloneFlags::CLONE_NEWNET)?;
    configured
}

/// Configures the interfaces of the namespace that the thread is in.
fn configure(service: &Service) -> io::Result<()> {
    let netlink = Netlink::open()?;
    for name in ["lo", "eth0"] {
        let index = index(name).ok_or_else(|| io::Error::other(format!("the namespace has no {name}")))?;
        if name == "eth0" {
            netlink.add_address(index, service.subnet.address, service.subnet.prefix)?;
        }
        netlink.up(index)?;
        if name == "eth0"
            && let Some(gateway) = service.gateway
        {
            netlink.add_default_route(index, gateway)?;
        }
    }
    Ok(())
}

/// Removes what a service stands for; what is not there is as it should be.
fn remove(service: &Service) -> io::Result<()> {
    let netlink = Netlink::open()?;
    netlink.remove(&service.port())?;
    unbind(&service.namespace())?;
    let others = recorded(&service.stack).map_err(io::Error::other)?;
    let mut neighbours = others.iter().filter(|other| other.name != service.name);
    if !neighbours.any(|other| other.network == service.network) {
        netlink.remove(&service.bridge())?;
    }
    match fs::remove_file(service.record()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Only when it is empty.
    let _ = fs::remove_dir(Path::new(STATE).join(&service.stack));
    Ok(())
}

fn namespace_of_this_thread() -> io::Result<File> {
    File::open("/proc/thread-self/ns/net")
}

/// Names the thread's network namespace, which then lives on without a process.
fn bind(path: &Path) -> io::Result<()> {
    fs::create_dir_all(NAMESPACES)?;
    File::create(path)?;
    let from = Some("/proc/thread-self/ns/net");
    Ok(mount(from, path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Undoes [`bind`]. Processes inside keep the namespace, without its way out.
fn unbind(path: &Path) -> io::Result<()> {
    if is_namespace(path) {
        umount2(path, MntFlags::MNT_DETACH)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(network: &str, subnet: &str, gateway: Option<&str>) -> Service {
        Service {
            stack: "stack".into(),
            name: "web".into(),
            subnet: subnet.parse().unwrap(),
            network: network.into(),
            gateway: gateway.map(|address| address.parse().unwrap()),
        }
    }

    #[test]
    fn a_record_reads_as_it_was_written() {
        for service in [
            service("front end", "10.0.0.2/24", Some("10.0.0.1")),
            service("", "fd00::2/128", None),
        ] {
            assert_eq!(Service::parse("stack", "web", &service.text()), Some(service));
        }
        assert_eq!(Service::parse("stack", "web", "10.0.0.2/24\n"), None);
    }

    #[test]
    fn interfaces_have_short_names_of_their_own() {
        let ours = service("net", "10.0.0.2/24", None);
        assert!(ours.bridge().len() <= 15 && ours.port().len() <= 15);
        assert_ne!(ours.bridge()[3..], ours.port()[3..]);
        assert_ne!(short("x", &["ab", "c"]), short("x", &["a", "bc"]));
    }

    #[test]
    fn a_gateway_is_the_networks_or_the_first_free_address() {
        let wanted = service("net", "10.0.0.3/24", None);
        let known = [service("net", "10.0.0.9/24", Some("10.0.0.7"))];
        assert_eq!(gateway(&wanted, &known, &[]), Some("10.0.0.7".parse().unwrap()));
        let taken = [
            ("net".into(), "10.0.0.1".parse().unwrap()),
            ("other".into(), "10.0.0.2".parse().unwrap()),
        ];
        assert_eq!(gateway(&wanted, &[], &taken), Some("10.0.0.2".parse().unwrap()));
    }

    #[test]
    fn names_are_parts_of_a_file_name() {
        for name in ["web", "web-1_2.x"] {
            assert!(plain("it", name).is_ok());
        }
        for name in ["", ".", "..", ".x", "a/b", "a b", &"x".repeat(101)] {
            assert!(plain("it", name).is_err(), "{name}");
        }
    }
}
