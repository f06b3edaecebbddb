//! `NetworkService` of the real binary, in a network and a mount namespace of its own: this machine's stay as they are.

mod running;

use running::Agent;
use tonic::{Code, Status};
use vz_guest_agent::proto::agent_service_client::AgentServiceClient;
use vz_guest_agent::proto::exec_event::Event;
use vz_guest_agent::proto::network_service_client::NetworkServiceClient;
use vz_guest_agent::proto::{
    ExecRequest, NetworkServiceConfig, NetworkSetupRequest, NetworkTeardownRequest, TransportMetadata,
};

/// The agent, where it may change the network; `None` when this machine does not let it.
async fn isolated() -> Option<Agent> {
    let words = ["unshare", "--net", "--mount", "sh", "-c"];
    let may = std::process::Command::new(words[0])
        .args(&words[1..])
        .arg("mount -t tmpfs tmpfs /run")
        .status();
    if !may.is_ok_and(|status| status.success()) {
        eprintln!("not checked: this machine lets nobody make namespaces");
        return None;
    }
    let script = r#"mount -t tmpfs tmpfs /run && exec "$0" "$@""#;
    Some(Agent::start_by(&[&words[..], &[script]].concat(), &[]).await)
}

fn service(name: &str, addr: &str, network: &str) -> NetworkServiceConfig {
    NetworkServiceConfig {
        name: name.into(),
        addr: addr.into(),
        network_name: network.into(),
    }
}

async fn setup(agent: &Agent, stack: &str, services: &[NetworkServiceConfig]) -> Result<(), Status> {
    let request = NetworkSetupRequest {
        stack_id: stack.into(),
        services: services.to_vec(),
        metadata: None,
    };
    let mut client = NetworkServiceClient::new(agent.channel.clone());
    client.setup(request).await.map(drop)
}

async fn teardown(agent: &Agent, stack: &str, names: &[&str]) -> Result<(), Status> {
    let request = NetworkTeardownRequest {
        stack_id: stack.into(),
        service_names: names.iter().map(ToString::to_string).collect(),
        metadata: None,
    };
    let mut client = NetworkServiceClient::new(agent.channel.clone());
    client.teardown(request).await.map(drop)
}

/// What a script says where the agent is; it must succeed.
async fn shell(agent: &Agent, script: &str) -> String {
    let request = ExecRequest {
        command: "sh".into(),
        args: vec!["-ec".into(), format!("exec 2>&1\n{script}")],
        ..ExecRequest::default()
    };
    let mut events = AgentServiceClient::new(agent.channel.clone())
        .exec(request)
        .await
        .unwrap()
        .into_inner();
    let mut said = Vec::new();
    while let Some(event) = events.message().await.unwrap() {
        match event.event.unwrap() {
            Event::Stdout(bytes) => said.extend(bytes),
            Event::ExitCode(0) => {}
            other => panic!("{script}: {other:?}: {}", String::from_utf8_lossy(&said)),
        }
    }
    String::from_utf8(said).unwrap()
}

/// Whether a service gets an answer from an address: its kernel's, that nothing listens on the port.
async fn reaches(agent: &Agent, namespace: &str, address: &str) -> bool {
    let script = format!("nsenter --net=/run/netns/{namespace} timeout 3 bash -c ': </dev/tcp/{address}/9' || :");
    shell(agent, &script).await.contains("Connection refused")
}

/// All that a call can leave behind.
async fn everything(agent: &Agent) -> String {
    shell(
        agent,
        "{ ip -o link | cut -d: -f2 | cut -d@ -f1; find /run/netns /run/vz 2>/dev/null; } | sort",
    )
    .await
}

/// What is left when all is removed: the directories stay.
async fn rest(agent: &Agent) -> String {
    let after = everything(agent).await;
    after
        .replace("/run/netns\n", "")
        .replace("/run/vz\n", "")
        .replace("/run/vz/network\n", "")
}

#[tokio::test]
async fn services_of_a_network_reach_each_other_and_the_gateway() {
    let Some(agent) = isolated().await else { return };
    let before = everything(&agent).await;
    let web = service("web", "10.9.0.10/24", "front");
    let db = service("db", "10.9.0.11/24", "front");
    let other = service("other", "10.9.0.12/24", "back");
    setup(&agent, "shop", &[web.clone(), db, other]).await.unwrap();
    let inside = "nsenter --net=/run/netns/web";
    let said = shell(&agent, &format!("{inside} ip -o addr show up; {inside} ip route")).await;
    assert!(
        said.contains("inet 10.9.0.10/24") && said.contains("inet 127.0.0.1/8"),
        "{said}"
    );
    assert!(said.contains("default via 10.9.0.1 dev eth0"), "{said}");
    assert!(reaches(&agent, "web", "10.9.0.11").await);
    assert!(reaches(&agent, "web", "10.9.0.1").await);
    // Another network, although with the same addresses.
    assert!(!reaches(&agent, "web", "10.9.0.12").await);

    // Again is no change, and a further service finds the bridge.
    let state = everything(&agent).await;
    setup(&agent, "shop", &[web]).await.unwrap();
    assert_eq!(everything(&agent).await, state);
    setup(&agent, "shop", &[service("cache", "10.9.0.13/24", "front")])
        .await
        .unwrap();
    assert!(reaches(&agent, "web", "10.9.0.13").await);

    teardown(&agent, "shop", &["db", "nobody"]).await.unwrap();
    assert!(!reaches(&agent, "web", "10.9.0.11").await);
    assert!(reaches(&agent, "web", "10.9.0.1").await);
    teardown(&agent, "shop", &[]).await.unwrap();
    teardown(&agent, "shop", &[]).await.unwrap();
    assert_eq!(rest(&agent).await, before);
}

#[tokio::test]
async fn ipv6_works_alike() {
    let Some(agent) = isolated().await else { return };
    if std::fs::read("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|text| text != b"0\n") {
        return;
    }
    let services = [service("a", "fd00:9::2/64", "n"), service("b", "fd00:9::3/64", "n")];
    setup(&agent, "six", &services).await.unwrap();
    assert!(reaches(&agent, "a", "fd00:9::3").await);
    assert!(reaches(&agent, "a", "fd00:9::1").await);
    let said = shell(&agent, "nsenter --net=/run/netns/a ip -6 route").await;
    assert!(said.contains("default via fd00:9::1 dev eth0"), "{said}");
    teardown(&agent, "six", &[]).await.unwrap();
}

#[tokio::test]
async fn the_gateway_leaves_the_services_their_addresses() {
    let Some(agent) = isolated().await else { return };
    let services = [service("a", "10.9.0.1/29", "n"), service("b", "10.9.0.2/29", "n")];
    setup(&agent, "s", &services).await.unwrap();
    let said = shell(&agent, "nsenter --net=/run/netns/a ip route").await;
    assert!(said.contains("default via 10.9.0.3"), "{said}");
    // The gateway is taken now; and a subnet of one has none.
    let taken = setup(&agent, "s", &[service("c", "10.9.0.3/29", "n")])
        .await
        .unwrap_err();
    assert_eq!(taken.code(), Code::InvalidArgument);
    assert!(taken.message().contains("10.9.0.3"), "{taken}");
    setup(&agent, "s", &[service("alone", "10.9.9.9/32", "m")])
        .await
        .unwrap();
    assert_eq!(shell(&agent, "nsenter --net=/run/netns/alone ip route").await, "");
}

#[tokio::test]
async fn a_failure_half_way_leaves_nothing() {
    let Some(agent) = isolated().await else { return };
    let before = everything(&agent).await;
    // No file can be made where the second namespace is to be named.
    shell(&agent, "mkdir -p /run/netns/second/x").await;
    let services = [
        service("first", "10.9.0.2/24", "n"),
        service("second", "10.9.0.3/24", "n"),
    ];
    let status = setup(&agent, "s", &services).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().contains("\"second\""), "{status}");
    shell(&agent, "rm -r /run/netns/second").await;
    assert_eq!(rest(&agent).await, before);
    setup(&agent, "s", &services).await.unwrap();

    // One that is there loses nothing but what the call would have added.
    let state = everything(&agent).await;
    shell(&agent, "mkdir -p /run/netns/third/x").await;
    let more = [
        service("first", "10.9.1.2/24", "m"),
        service("third", "10.9.1.3/24", "m"),
    ];
    setup(&agent, "s", &more).await.unwrap_err();
    shell(&agent, "rm -r /run/netns/third").await;
    assert_eq!(everything(&agent).await, state);
    assert!(reaches(&agent, "first", "10.9.0.3").await);
    setup(&agent, "s", &more).await.unwrap();
    assert!(reaches(&agent, "first", "10.9.1.3").await);
}

#[tokio::test]
async fn what_is_half_there_is_made_whole() {
    let Some(agent) = isolated().await else { return };
    let services = [
        service("a", "10.9.0.2/24", "n"),
        service("a", "10.9.1.2/24", "m"),
        service("b", "10.9.0.3/24", "n"),
        service("b", "10.9.1.3/24", "m"),
    ];
    setup(&agent, "s", &services).await.unwrap();
    let state = everything(&agent).await;
    for half in [
        "nsenter --net=/run/netns/a ip link del eth0",
        "nsenter --net=/run/netns/a ip link del eth1",
        "umount /run/netns/a",
        "umount /run/netns/a; rm /run/netns/a",
        // The bridges, and a port that is not ready.
        "for l in $(ip -o link | cut -d' ' -f2 | grep ^vzb | tr -d :); do ip link del $l; done",
        "p=$(ip -o link | cut -d' ' -f2 | grep ^vzp | cut -d@ -f1 | head -1); ip link set $p down name vzd${p#vzp}",
    ] {
        shell(&agent, half).await;
        setup(&agent, "s", &services).await.unwrap();
        assert_eq!(everything(&agent).await, state, "{half}");
        for address in ["10.9.0.3", "10.9.1.3"] {
            assert!(reaches(&agent, "a", address).await, "{half}: {address}");
        }
    }
}

#[tokio::test]
async fn what_means_nothing_is_refused_before_anything_is_made() {
    let Some(agent) = isolated().await else { return };
    let before = everything(&agent).await;
    let good = service("good", "10.9.0.2/24", "n");
    for (stack, bad, named) in [
        ("s/t", service("x", "10.9.0.3/24", "n"), "s/t"),
        ("", service("x", "10.9.0.3/24", "n"), "stack_id"),
        ("s", service("../x", "10.9.0.3/24", "n"), "../x"),
        ("s", service("x", "10.9.0.3", "n"), "10.9.0.3"),
        ("s", service("x", "10.9.0.0/24", "n"), "10.9.0.0/24"),
        ("s", service("x", "10.9.0.2/24", "n"), "10.9.0.2"),
        ("s", service("good", "10.9.0.3/24", "n"), "twice"),
        ("s", service("good", "10.9.0.3/25", "m"), "apart"),
        ("s", service("x", "10.9.0.3/24", "a\nb"), "a\\nb"),
    ] {
        let status = setup(&agent, stack, &[good.clone(), bad]).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(named), "{status}");
    }
    assert_eq!(
        teardown(&agent, "..", &[]).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    assert_eq!(everything(&agent).await, before);

    setup(&agent, "s", &[good]).await.unwrap();
    let moved = setup(&agent, "s", &[service("good", "10.9.0.9/24", "n")])
        .await
        .unwrap_err();
    assert_eq!(moved.code(), Code::AlreadyExists);
    let apart = setup(&agent, "s", &[service("good", "10.9.0.3/16", "m")])
        .await
        .unwrap_err();
    assert_eq!(apart.code(), Code::InvalidArgument);
    // What somebody else has made is theirs.
    shell(&agent, "ip netns add theirs").await;
    let foreign = setup(&agent, "s", &[service("theirs", "10.9.0.5/24", "n")])
        .await
        .unwrap_err();
    assert_eq!(foreign.code(), Code::AlreadyExists);
    assert!(foreign.message().contains("/var/run/netns/theirs"), "{foreign}");
}

#[tokio::test]
async fn a_service_may_stand_on_several_networks() {
    let Some(agent) = isolated().await else { return };
    let before = everything(&agent).await;
    // In any order: each service's own counts.
    let services = [
        service("web", "10.9.2.10/24", "front"),
        service("db", "10.9.1.11/24", "back"),
        service("web", "10.9.1.10/24", "back"),
        service("web", "fd00:9::10/64", "six"),
    ];
    setup(&agent, "shop", &services).await.unwrap();
    let inside = "nsenter --net=/run/netns/web";
    let said = shell(
        &agent,
        &format!("{inside} ip -o addr; {inside} ip route; {inside} ip -6 route"),
    )
    .await;
    for wanted in [
        "eth0    inet 10.9.2.10/24",
        "eth1    inet 10.9.1.10/24",
        "eth2    inet6 fd00:9::10/64",
        "default via 10.9.2.1 dev eth0",
        "default via fd00:9::1 dev eth2",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    assert_eq!(said.matches("default").count(), 2, "{said}");
    assert!(reaches(&agent, "web", "10.9.1.11").await);
    assert!(reaches(&agent, "db", "10.9.1.10").await);
    assert!(reaches(&agent, "web", "10.9.2.1").await);

    // Again, in part and in another order, is no change.
    let state = everything(&agent).await;
    let turned = [services[2].clone(), services[0].clone()];
    setup(&agent, "shop", &turned).await.unwrap();
    assert_eq!(everything(&agent).await, state);

    // One that is on a network stays, with what runs there, and gets another.
    let (namespace, more) = ("stat -L -c %i /run/netns/db", service("db", "10.9.2.11/24", "front"));
    let same = shell(&agent, namespace).await;
    setup(&agent, "shop", &[more]).await.unwrap();
    assert_eq!(shell(&agent, namespace).await, same);
    let said = shell(&agent, "nsenter --net=/run/netns/db ip route").await;
    assert!(said.contains("default via 10.9.1.1 dev eth0"), "{said}");
    assert!(reaches(&agent, "db", "10.9.2.10").await);

    teardown(&agent, "shop", &["web"]).await.unwrap();
    assert!(reaches(&agent, "db", "10.9.2.1").await);
    assert_eq!(shell(&agent, "ls /run/netns").await, "db\n");
    teardown(&agent, "shop", &[]).await.unwrap();
    assert_eq!(rest(&agent).await, before);
}

#[tokio::test]
async fn two_stacks_do_not_share_a_service() {
    let Some(agent) = isolated().await else { return };
    setup(&agent, "one", &[service("web", "10.9.0.2/24", "n")])
        .await
        .unwrap();
    let state = everything(&agent).await;
    let both = [service("db", "10.9.1.2/24", "n"), service("web", "10.9.1.3/24", "n")];
    let taken = setup(&agent, "two", &both).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    for word in ["\"web\"", "\"one\"", "\"two\"", "/var/run/netns/web"] {
        assert!(taken.message().contains(word), "{taken}");
    }
    assert_eq!(everything(&agent).await, state);
    // Another stack's end is not its own.
    teardown(&agent, "two", &["web"]).await.unwrap();
    assert_eq!(everything(&agent).await, state);
    teardown(&agent, "one", &[]).await.unwrap();
    setup(&agent, "two", &both).await.unwrap();
    assert!(reaches(&agent, "web", "10.9.1.2").await);
}

#[tokio::test]
async fn an_agent_that_is_started_again_has_forgotten_nothing() {
    let Some(agent) = isolated().await else { return };
    let before = everything(&agent).await;
    setup(
        &agent,
        "s",
        &[service("a", "10.9.0.2/24", "n"), service("a", "10.9.1.2/24", "m")],
    )
    .await
    .unwrap();
    let state = everything(&agent).await;
    let pid = agent.process.id().to_string();
    let again = Agent::start_by(&["nsenter", "--target", &pid, "--net", "--mount"], &[]).await;
    setup(&again, "s", &[service("a", "10.9.0.2/24", "n")]).await.unwrap();
    assert_eq!(everything(&again).await, state);
    let other = setup(&again, "s", &[service("b", "10.9.0.2/24", "n")])
        .await
        .unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument);
    teardown(&again, "s", &[]).await.unwrap();
    assert_eq!(rest(&again).await, before);
}

#[tokio::test]
async fn a_root_without_var_run_gets_one() {
    let Some(agent) = isolated().await else { return };
    shell(&agent, "mount -t tmpfs tmpfs /var").await;
    setup(&agent, "s", &[service("a", "10.9.0.2/24", "n")]).await.unwrap();
    assert_eq!(shell(&agent, "readlink /var/run; ls /run/netns").await, "/run\na\n");
    // Where it is a directory of its own it stays one.
    teardown(&agent, "s", &[]).await.unwrap();
    shell(&agent, "rm /var/run; mkdir /var/run").await;
    setup(&agent, "s", &[service("a", "10.9.0.2/24", "n")]).await.unwrap();
    assert_eq!(shell(&agent, "ls /var/run/netns; ls /run/netns").await, "a\n");
    teardown(&agent, "s", &[]).await.unwrap();
}

#[tokio::test]
async fn a_key_answers_again() {
    let Some(agent) = isolated().await else { return };
    let request = NetworkSetupRequest {
        stack_id: "s".into(),
        services: vec![service("a", "10.9.0.2/24", "n")],
        metadata: Some(TransportMetadata {
            request_id: String::new(),
            idempotency_key: "key".into(),
        }),
    };
    let mut client = NetworkServiceClient::new(agent.channel.clone());
    client.setup(request.clone()).await.unwrap();
    teardown(&agent, "s", &[]).await.unwrap();
    client.setup(request).await.unwrap();
    // Answered, and not done again.
    shell(&agent, "! ls /run/netns/a").await;
}
