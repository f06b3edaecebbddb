//! The command line: listen, say so once, serve.

use std::path::PathBuf;
use std::process::ExitCode;

use vz_guest_agent::transport::{Endpoint, Listener, announce};
use vz_guest_agent::{AGENT_PROTOCOL_REVISION, VERSION, limits, oom, serve, shim};

const USAGE: &str = "\
usage: vz-guest-agent [--listen ENDPOINT] [--ready ENDPOINT] [--oci-runtime PATH] [--version]

  --listen ENDPOINT   where to serve: vsock:PORT (default vsock:7424) or unix:PATH
  --ready ENDPOINT    whom to tell once that it listens: vsock:PORT on the host, or unix:PATH
                      (default vsock:7425 when listening on vsock, else nobody)
  --oci-runtime PATH  the program that runs containers (default /run/vz-oci/bin/youki, else /usr/local/bin/youki)
  --version           print the version and the protocol revision";

struct Options {
    listen: Endpoint,
    ready: Option<Endpoint>,
    oci_runtime: Option<PathBuf>,
}

enum Asked {
    Serve(Options),
    Version,
    Help,
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Asked, String> {
    let (mut listen, mut ready) = (Endpoint::Vsock(7424), None);
    let mut oci_runtime = None;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--version" => return Ok(Asked::Version),
            "--help" | "-h" => return Ok(Asked::Help),
            "--listen" | "--ready" => {
                let value = arguments
                    .next()
                    .ok_or_else(|| format!("{argument} wants an endpoint"))?;
                let endpoint = value.parse()?;
                if argument == "--listen" {
                    listen = endpoint;
                } else {
                    ready = Some(endpoint);
                }
            }
            "--oci-runtime" => oci_runtime = Some(arguments.next().ok_or("--oci-runtime wants a path")?.into()),
            _ => return Err(format!("{argument:?} is not an option")),
        }
    }
    if ready.is_none() && matches!(listen, Endpoint::Vsock(_)) {
        ready = Some(Endpoint::Vsock(7425));
    }
    Ok(Asked::Serve(Options {
        listen,
        ready,
        oci_runtime,
    }))
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    shim::run(&arguments).unwrap_or_else(agent)
}

// One thread is enough: the agent waits for pipes and sockets, and a guest often has one CPU and little memory.
#[tokio::main(flavor = "current_thread")]
async fn agent() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Asked::Serve(options)) => options,
        Ok(Asked::Version) => {
            println!("vz-guest-agent {VERSION} (protocol revision {AGENT_PROTOCOL_REVISION})");
            return ExitCode::SUCCESS;
        }
        Ok(Asked::Help) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(problem) => {
            eprintln!("vz-guest-agent: {problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if std::process::id() == 1 {
        eprintln!("vz-guest-agent: this is no init: start it as a child of PID 1, which restarts it when it ends");
        return ExitCode::from(2);
    }
    if let Err(error) = limits::raise() {
        eprintln!("vz-guest-agent: the limit of open files stays as it is: {error}");
    }
    // On a Unix socket this is no guest, and whom the machine ends first is not ours to say.
    if matches!(options.listen, Endpoint::Vsock(_))
        && let Err(error) = oom::protect()
    {
        eprintln!("vz-guest-agent: it may be ended when memory runs out: {error}");
    }
    let listener = match Listener::bind(&options.listen) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("vz-guest-agent: cannot listen on {}: {error}", options.listen);
            return ExitCode::FAILURE;
        }
    };
    if let Some(resume) = listener.resume() {
        tokio::spawn(resume.watch());
    }
    if let Some(endpoint) = options.ready {
        // On a Unix socket this is no guest: the clock is the machine's, and not ours to set.
        let in_guest = matches!(options.listen, Endpoint::Vsock(_));
        tokio::spawn(async move {
            match announce(&endpoint).await {
                Err(error) => eprintln!("vz-guest-agent: nobody took the ready line on {endpoint}: {error}"),
                Ok(Some(time)) if in_guest => match time.set() {
                    Ok(true) => eprintln!("vz-guest-agent: the clock was off and is set to the host's time"),
                    Ok(false) => {}
                    Err(error) => eprintln!("vz-guest-agent: the clock is off and could not be set: {error}"),
                },
                Ok(_) => {}
            }
        });
    }
    match serve(listener.connections(), options.oci_runtime).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vz-guest-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Result<Options, String> {
        match parse(arguments.iter().map(ToString::to_string))? {
            Asked::Serve(options) => Ok(options),
            Asked::Version | Asked::Help => Err("not serving".into()),
        }
    }

    #[test]
    fn the_default_is_the_contracts_port_and_a_ready_line() {
        let options = options(&[]).unwrap();
        assert_eq!(options.listen, Endpoint::Vsock(7424));
        assert_eq!(options.ready, Some(Endpoint::Vsock(7425)));
    }

    #[test]
    fn a_unix_socket_tells_nobody_unless_asked_to() {
        assert_eq!(options(&["--listen", "unix:/a"]).unwrap().ready, None);
        let asked = options(&["--listen", "unix:/a", "--ready", "unix:/b"]).unwrap();
        assert_eq!(asked.ready, Some(Endpoint::Unix("/b".into())));
    }

    #[test]
    fn wrong_words_are_refused() {
        assert!(options(&["--liste", "unix:/a"]).is_err());
        assert!(options(&["--listen"]).is_err());
        assert!(options(&["--listen", "tcp:80"]).is_err());
    }
}
