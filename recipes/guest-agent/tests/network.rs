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
        "ip -o link | cut -d: -f2 | cut -d@ -f1; find /run/netns /run/vz 2>/dev/null || :",
    )
    .await
}

#[tokio::test]
async fn services_of_a_network_reach_each_other_and_the_gateway() {
    let Some(agent) = isolated().await else { return };
    let before = everything(&agent).await;
    let web = service("web", "10.9.0.10/24", "front");
    let db = service("db", "10.9.0.11/24", "front");
    let other = service("other", "10.9.0.12/24", "back");
    setup(&agent, "shop", &[web.clone(), db, other]).await.unwrap();
    let inside = "nsenter --net=/run/netns/shop-web";
    let said = shell(&agent, &format!("{inside} ip -o addr show up; {inside} ip route")).await;
    assert!(
        said.contains("inet 10.9.0.10/24") && said.contains("inet 127.0.0.1/8"),
        "{said}"
    );
    assert!(said.contains("default via 10.9.0.1 dev eth0"), "{said}");
    assert!(reaches(&agent, "shop-web", "10.9.0.11").await);
    assert!(reaches(&agent, "shop-web", "10.9.0.1").await);
    // Another network, although with the same addresses.
    assert!(!reaches(&agent, "shop-web", "10.9.0.12").await);

    // Again is no change, and a further service finds the bridge.
    let state = everything(&agent).await;
    setup(&agent, "shop", &[web]).await.unwrap();
    assert_eq!(everything(&agent).await, state);
    setup(&agent, "shop", &[service("cache", "10.9.0.13/24", "front")])
        .await
        .unwrap();
    assert!(reaches(&agent, "shop-web", "10.9.0.13").await);

    teardown(&agent, "shop", &["db", "nobody"]).await.unwrap();
    assert!(!reaches(&agent, "shop-web", "10.9.0.11").await);
    assert!(reaches(&agent, "shop-web", "10.9.0.1").await);
    teardown(&agent, "shop", &[]).await.unwrap();
    teardown(&agent, "shop", &[]).await.unwrap();
    let after = everything(&agent).await;
    assert_eq!(after.replace("/run/netns\n/run/vz\n/run/vz/network\n", ""), before);
}

#[tokio::test]
async fn ipv6_works_alike() {
    let Some(agent) = isolated().await else { return };
    if std::fs::read("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|text| text != b"0\n") {
        return;
    }
    let services = [service("a", "fd00:9::2/64", "n"), service("b", "fd00:9::3/64", "n")];
    setup(&agent, "six", &services).await.unwrap();
    assert!(reaches(&agent, "six-a", "fd00:9::3").await);
    assert!(reaches(&agent, "six-a", "fd00:9::1").await);
    let said = shell(&agent, "nsenter --net=/run/netns/six-a ip -6 route").await;
    assert!(said.contains("default via fd00:9::1 dev eth0"), "{said}");
    teardown(&agent, "six", &[]).await.unwrap();
}

#[tokio::test]
async fn the_gateway_leaves_the_services_their_addresses() {
    let Some(agent) = isolated().await else { return };
    let services = [service("a", "10.9.0.1/29", "n"), service("b", "10.9.0.2/29", "n")];
    setup(&agent, "s", &services).await.unwrap();
    let said = shell(&agent, "nsenter --net=/run/netns/s-a ip route").await;
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
    assert_eq!(shell(&agent, "nsenter --net=/run/netns/s-alone ip route").await, "");
}

#[tokio::test]
async fn a_failure_half_way_leaves_nothing() {
    let Some(agent) = isolated().await else { return };
    let before = everything(&agent).await;
    // No file can be made where the second namespace is to be named.
    shell(&agent, "mkdir -p /run/netns/s-second/x").await;
    let services = [
        service("first", "10.9.0.2/24", "n"),
        service("second", "10.9.0.3/24", "n"),
    ];
    let status = setup(&agent, "s", &services).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().contains("\"second\""), "{status}");
    shell(&agent, "rm -r /run/netns/s-second").await;
    let after = everything(&agent).await;
    assert_eq!(after.replace("/run/netns\n/run/vz\n/run/vz/network\n", ""), before);
    setup(&agent, "s", &services).await.unwrap();
}

#[tokio::test]
async fn what_is_half_there_is_made_whole() {
    let Some(agent) = isolated().await else { return };
    let services = [service("a", "10.9.0.2/24", "n"), service("b", "10.9.0.3/24", "n")];
    setup(&agent, "s", &services).await.unwrap();
    shell(&agent, "nsenter --net=/run/netns/s-a ip link del eth0").await;
    setup(&agent, "s", &services).await.unwrap();
    assert!(reaches(&agent, "s-a", "10.9.0.3").await);
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
    for (stack, service, code) in [
        ("s", service("good", "10.9.0.9/24", "n"), Code::AlreadyExists),
        ("s", service("good", "10.9.0.2/24", "m"), Code::AlreadyExists),
    ] {
        assert_eq!(setup(&agent, stack, &[service]).await.unwrap_err().code(), code);
    }
    // `s-good` of one stack is not `good` of another.
    shell(&agent, "ip netns add a-b-c").await;
    let foreign = setup(&agent, "a-b", &[service("c", "10.9.0.2/24", "n")])
        .await
        .unwrap_err();
    assert_eq!(foreign.code(), Code::AlreadyExists);
    assert!(foreign.message().contains("/run/netns/a-b-c"), "{foreign}");
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
    shell(&agent, "! ls /run/netns/s-a").await;
}
