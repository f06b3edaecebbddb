//! `NetworkService`: a bridge for each network of a stack, and for each of its services a network namespace on some.
//!
//! A service's namespace is `/var/run/netns/<service>`, as `ip netns` names them, with `lo` and for each of its networks
//! one end of a veth pair, `eth0`, `eth1` and so on. The other end is a port of the network's bridge, which has an
//! address as well: the gateway. What was set up is recorded in [`STATE`], one file a service, written before and
//! removed after what it stands for; so it outlives the agent, and nothing that is half there is forgotten. A port has
//! its name once all is done that belongs to it.

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

use crate::idempotency::to_the_end;
use crate::netlink::{Netlink, index};
use crate::proto::network_service_server::NetworkService;
use crate::proto::{NetworkSetupRequest, NetworkSetupResponse, NetworkTeardownRequest, NetworkTeardownResponse};
use crate::subnet::Subnet;

/// A directory for each stack, in it a file for each service.
const STATE: &str = "/run/vz/network";

/// Where named network namespaces are (ip-netns(8)).
const NAMESPACES: &str = "/var/run/netns";

/// The service.
#[derive(Default)]
pub struct Network {
    /// One call at a time: bridges are shared.
    busy: Arc<Mutex<()>>,
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
        to_the_end("NetworkService.Setup", request, call).await
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
        to_the_end("NetworkService.Teardown", request, call).await
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
    /// `eth0` is the first.
    legs: Vec<Leg>,
}

/// A service's end of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Leg {
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
        Path::new(NAMESPACES).join(&self.name)
    }

    /// The name of a leg's interface at the bridge. Names have at most 15 bytes.
    fn port(&self, leg: &Leg) -> String {
        short("vzp", &[&self.stack, &self.name, &leg.network])
    }

    /// The port's name until it is ready.
    fn draft(&self, leg: &Leg) -> String {
        short("vzd", &[&self.stack, &self.name, &leg.network])
    }

    fn bridge(&self, leg: &Leg) -> String {
        short("vzb", &[&self.stack, &leg.network])
    }

    /// Three lines a leg.
    fn text(&self) -> String {
        let lines = self.legs.iter().map(|leg| {
            let gateway = leg.gateway.map(|address| address.to_string()).unwrap_or_default();
            format!("{}\n{gateway}\n{}\n", leg.subnet, leg.network)
        });
        lines.collect()
    }

    fn parse(stack: &str, name: &str, text: &str) -> Option<Self> {
        let mut legs = Vec::new();
        let mut lines = text.lines();
        while let Some(subnet) = lines.next() {
            let (gateway, network) = (lines.next()?, lines.next()?);
            legs.push(Leg {
                subnet: subnet.parse().ok()?,
                network: network.to_owned(),
                gateway: if gateway.is_empty() {
                    None
                } else {
                    Some(gateway.parse().ok()?)
                },
            });
        }
        (!legs.is_empty()).then(|| Self {
            stack: stack.to_owned(),
            name: name.to_owned(),
            legs,
        })
    }

    /// Whether a leg's gateway is the way to everywhere: of those of one kind, IPv4 or IPv6, the first one's is.
    fn leads_out(&self, number: usize) -> bool {
        let kind = |leg: &Leg| leg.gateway.map(|gateway| gateway.is_ipv4());
        let own = kind(&self.legs[number]);
        own.is_some() && self.legs[..number].iter().all(|leg| kind(leg) != own)
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
    // All is checked before anything is made.
    let wanted = wanted(stack, request)?;
    let mut known = recorded(stack)?;
    for service in &wanted {
        check(service, &known, &wanted)?;
    }
    let addresses: Vec<(String, IpAddr)> = legs(wanted.iter().chain(&known))
        .map(|leg| (leg.network.clone(), leg.subnet.address))
        .collect();
    let mut made: Vec<(Service, usize)> = Vec::new();
    for service in wanted {
        let at = known.iter().position(|other| other.name == service.name);
        let at = at.unwrap_or_else(|| {
            known.push(Service {
                legs: Vec::new(),
                ..service.clone()
            });
            known.len() - 1
        });
        let before = known[at].legs.len();
        for mut leg in service.legs {
            if !known[at].legs.iter().any(|other| other.network == leg.network) {
                leg.gateway = gateway(&leg, legs(&known), &addresses);
                known[at].legs.push(leg);
            }
        }
        made.push((known[at].clone(), before));
        if let Err(error) = make(&known[at]) {
            let sentence = format!(
                "service {:?} of stack {stack:?} cannot be given its network: {error}; nothing of the call is left",
                service.name
            );
            for (service, before) in made.iter().rev() {
                let _ = remove(service, *before);
            }
            return Err(Status::internal(sentence));
        }
    }
    Ok(())
}

fn legs<'a>(services: impl IntoIterator<Item = &'a Service>) -> impl Iterator<Item = &'a Leg> {
    services.into_iter().flat_map(|service| &service.legs)
}

/// The services of a request, each once, with its networks in the request's order.
fn wanted(stack: &str, request: &NetworkSetupRequest) -> Result<Vec<Service>, Status> {
    let mut wanted: Vec<Service> = Vec::new();
    for service in &request.services {
        let name = plain("a service's name", &service.name)?;
        let subnet: Subnet = service.addr.parse().map_err(Status::invalid_argument)?;
        let network = &service.network_name;
        if network.len() > 255 || network.contains('\n') {
            return Err(Status::invalid_argument(format!(
                "{network:?} cannot name a network: it is too long, or more than a line"
            )));
        }
        let leg = Leg {
            subnet,
            network: network.clone(),
            gateway: None,
        };
        match wanted.iter_mut().find(|other| other.name == name) {
            Some(other) if other.legs.iter().any(|other| other.network == *network) => {
                return Err(Status::invalid_argument(format!(
                    "service {name:?} is named twice in network {network:?}"
                )));
            }
            Some(other) => other.legs.push(leg),
            None => wanted.push(Service {
                stack: stack.to_owned(),
                name: name.to_owned(),
                legs: vec![leg],
            }),
        }
    }
    Ok(wanted)
}

/// Whether a service can be set up beside the `known` ones of its stack and those that are `wanted` as well.
fn check(service: &Service, known: &[Service], wanted: &[Service]) -> Result<(), Status> {
    let (stack, name) = (&service.stack, &service.name);
    let before = known.iter().find(|other| other.name == *name);
    if before.is_none() {
        let namespace = service.namespace();
        if let Some(other) = stacks()?
            .into_iter()
            .find(|stack| Path::new(STATE).join(stack).join(name).exists())
        {
            return Err(Status::already_exists(format!(
                "{} is service {name:?} of stack {other:?}; that of stack {stack:?} needs another name, or the other one \
                 torn down first",
                namespace.display()
            )));
        }
        if is_namespace(&namespace) {
            return Err(Status::already_exists(format!(
                "{} is there already, and is not service {name:?} of stack {stack:?}",
                namespace.display()
            )));
        }
    }
    let had: Vec<&Leg> = legs(before).collect();
    for (number, leg) in service.legs.iter().enumerate() {
        if let Some(other) = had.iter().find(|other| other.network == leg.network) {
            if other.subnet != leg.subnet {
                return Err(Status::already_exists(format!(
                    "service {name:?} of stack {stack:?} is set up as {} in network {:?}; tear it down first",
                    other.subnet, other.network
                )));
            }
            continue;
        }
        let mut own = had.iter().copied().chain(&service.legs[..number]);
        if let Some(other) = own.find(|other| other.subnet.overlaps(&leg.subnet)) {
            return Err(Status::invalid_argument(format!(
                "service {name:?} has {} in network {:?} and {} in network {:?}: it could not tell their subnets apart",
                other.subnet, other.network, leg.subnet, leg.network
            )));
        }
        let mut others = known.iter().chain(wanted).filter(|other| other.name != *name);
        let taken = others.find(|other| {
            other.legs.iter().any(|other| {
                other.network == leg.network
                    && (other.subnet.address == leg.subnet.address || other.gateway == Some(leg.subnet.address))
            })
        });
        if let Some(other) = taken {
            return Err(Status::invalid_argument(format!(
                "the address {} of service {name:?} is taken in network {:?}, by service {:?} or its gateway",
                leg.subnet.address, leg.network, other.name
            )));
        }
    }
    Ok(())
}

/// The bridge's address for a leg: the one it has in the subnet, else the first that no service has or wants.
fn gateway<'a>(leg: &Leg, known: impl IntoIterator<Item = &'a Leg>, addresses: &[(String, IpAddr)]) -> Option<IpAddr> {
    let mut neighbours = known
        .into_iter()
        .filter(|other| other.network == leg.network && other.subnet.same_subnet(&leg.subnet));
    if let Some(neighbour) = neighbours.next() {
        return neighbour.gateway;
    }
    let taken: Vec<IpAddr> = addresses
        .iter()
        .filter(|(network, _)| *network == leg.network)
        .map(|(_, address)| *address)
        .collect();
    leg.subnet.first_free(&taken)
}

fn tear_down(request: &NetworkTeardownRequest) -> Result<(), Status> {
    let stack = plain("stack_id", &request.stack_id)?;
    for name in &request.service_names {
        plain("a service's name", name)?;
    }
    let names = &request.service_names;
    for service in recorded(stack)? {
        if names.is_empty() || names.contains(&service.name) {
            remove(&service, 0).map_err(|error| {
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

/// The stacks of which something is recorded.
fn stacks() -> Result<Vec<String>, Status> {
    names(Path::new(STATE)).map_err(|error| Status::internal(format!("{STATE} cannot be read: {error}")))
}

/// What is in a directory, sorted; nothing when it is not there.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// All services of a stack that are set up, or half so.
fn recorded(stack: &str) -> Result<Vec<Service>, Status> {
    let directory = Path::new(STATE).join(stack);
    let read = || {
        let mut found = Vec::new();
        for name in names(&directory)? {
            found.extend(Service::parse(
                stack,
                &name,
                &fs::read_to_string(directory.join(&name))?,
            ));
        }
        Ok(found)
    };
    read().map_err(|error: io::Error| Status::internal(format!("{} cannot be read: {error}", directory.display())))
}

/// Makes what a service stands for. What is whole stays, what an earlier try left half-way is removed first.
fn make(service: &Service) -> io::Result<()> {
    let netlink = Netlink::open()?;
    let home = namespace_of_this_thread()?;
    let path = service.namespace();
    let is_new = !is_namespace(&path);
    if is_new {
        // Their other ends were in another one.
        for leg in &service.legs {
            netlink.remove(&service.port(leg))?;
        }
        unbind(&path)?;
    }
    write(service)?;
    if is_new {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let bound = switch_on_loopback().and_then(|()| bind(&path));
        setns(&home, CloneFlags::CLONE_NEWNET)?;
        bound?;
    }
    let namespace = File::open(&path)?;
    for (number, leg) in service.legs.iter().enumerate() {
        let (port, draft) = (service.port(leg), service.draft(leg));
        let bridge = make_bridge(&netlink, &service.bridge(leg), leg)?;
        if let Some(there) = index(&port) {
            // The bridge may be another one than when the port was made.
            netlink.join(there, bridge)?;
            continue;
        }
        netlink.remove(&draft)?;
        let name = format!("eth{number}");
        // The same when it is made again: its neighbours know it.
        netlink.add_veth(&draft, bridge, (&name, ethernet(&port)), namespace.as_fd())?;
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        let configured = configure(&name, leg, service.leads_out(number));
        setns(&home, CloneFlags::CLONE_NEWNET)?;
        configured?;
        netlink.up(interface(&draft)?, Some(&port))?;
    }
    Ok(())
}

/// Records a service: whole or not at all, also when the agent is killed here.
fn write(service: &Service) -> io::Result<()> {
    fs::create_dir_all(Path::new(STATE).join(&service.stack))?;
    // No stack has such a name.
    let draft = Path::new(STATE).join(".draft");
    fs::write(&draft, service.text())?;
    fs::rename(&draft, service.record())
}

/// The index of a leg's bridge, which is made when it is not there.
fn make_bridge(netlink: &Netlink, name: &str, leg: &Leg) -> io::Result<u32> {
    if index(name).is_none() {
        netlink.add_bridge(name, ethernet(name))?;
    }
    let bridge = interface(name)?;
    if let Some(gateway) = leg.gateway {
        match netlink.add_address(bridge, gateway, leg.subnet.prefix) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    netlink.up(bridge, None)?;
    Ok(bridge)
}

fn interface(name: &str) -> io::Result<u32> {
    index(name).ok_or_else(|| io::Error::other(format!("the interface {name} is gone again")))
}

fn switch_on_loopback() -> io::Result<()> {
    Netlink::open()?.up(interface("lo")?, None)
}

/// Configures a leg's interface in the namespace that the thread is in.
fn configure(name: &str, leg: &Leg, leads_out: bool) -> io::Result<()> {
    let netlink = Netlink::open()?;
    let index = interface(name)?;
    netlink.add_address(index, leg.subnet.address, leg.subnet.prefix)?;
    netlink.up(index, None)?;
    match leg.gateway {
        Some(gateway) if leads_out => netlink.add_default_route(index, gateway),
        _ => Ok(()),
    }
}

/// Removes what a service stands for, but for its first `kept` legs; what is not there is as it should be.
fn remove(service: &Service, kept: usize) -> io::Result<()> {
    let netlink = Netlink::open()?;
    let (stay, go) = service.legs.split_at(kept);
    for leg in go {
        netlink.remove(&service.port(leg))?;
        netlink.remove(&service.draft(leg))?;
    }
    if kept == 0 {
        unbind(&service.namespace())?;
    }
    let others = recorded(&service.stack).map_err(io::Error::other)?;
    let others = others.iter().filter(|other| other.name != service.name);
    let used: Vec<&Leg> = legs(others).chain(stay).collect();
    for leg in go {
        if !used.iter().any(|other| other.network == leg.network) {
            netlink.remove(&service.bridge(leg))?;
        }
    }
    if kept > 0 {
        return write(&Service {
            legs: stay.to_vec(),
            ..service.clone()
        });
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
    // A root file system that has none gets it where all others have it.
    if fs::symlink_metadata("/var/run").is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        fs::create_dir_all("/var")?;
        std::os::unix::fs::symlink("/run", "/var/run")?;
    }
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

    fn leg(network: &str, subnet: &str, gateway: Option<&str>) -> Leg {
        Leg {
            subnet: subnet.parse().unwrap(),
            network: network.into(),
            gateway: gateway.map(|address| address.parse().unwrap()),
        }
    }

    fn service(legs: Vec<Leg>) -> Service {
        Service {
            stack: "stack".into(),
            name: "web".into(),
            legs,
        }
    }

    #[test]
    fn a_record_reads_as_it_was_written() {
        let front = leg("front end", "10.0.0.2/24", Some("10.0.0.1"));
        let nameless = leg("", "fd00::2/128", None);
        for service in [
            service(vec![front.clone()]),
            service(vec![nameless.clone()]),
            service(vec![front, nameless]),
        ] {
            assert_eq!(Service::parse("stack", "web", &service.text()), Some(service));
        }
        for text in [
            "",
            "10.0.0.2/24\n",
            "10.0.0.2/24\n\nfront\n10.0.0.3/24\n",
            "x\n\nfront\n",
        ] {
            assert_eq!(Service::parse("stack", "web", text), None);
        }
    }

    #[test]
    fn interfaces_have_short_names_of_their_own() {
        let legs = [leg("a", "10.0.0.2/24", None), leg("b", "10.0.1.2/24", None)];
        let ours = service(legs.to_vec());
        let names: Vec<String> = legs
            .iter()
            .flat_map(|leg| [ours.port(leg), ours.draft(leg), ours.bridge(leg)])
            .collect();
        assert!(names.iter().all(|name| name.len() <= 15));
        assert!(
            (1..names.len()).all(|at| !names[..at].contains(&names[at])),
            "{names:?}"
        );
        assert_ne!(short("x", &["ab", "c"]), short("x", &["a", "bc"]));
    }

    #[test]
    fn the_way_out_is_the_first_gateway_of_a_kind() {
        let ours = service(vec![
            leg("a", "10.0.0.2/32", None),
            leg("b", "10.0.1.2/24", Some("10.0.1.1")),
            leg("c", "fd00::2/64", Some("fd00::1")),
            leg("d", "10.0.2.2/24", Some("10.0.2.1")),
        ]);
        let out: Vec<bool> = (0..4).map(|number| ours.leads_out(number)).collect();
        assert_eq!(out, [false, true, true, false]);
    }

    #[test]
    fn a_gateway_is_the_networks_or_the_first_free_address() {
        let wanted = leg("net", "10.0.0.3/24", None);
        let known = [leg("net", "10.0.0.9/24", Some("10.0.0.7"))];
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
