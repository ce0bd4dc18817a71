//! Other proxies, as Debian or their own wheels package them, with two workers each and nothing else changed that the
//! load does not need. They run as root, whom the guard of an instance's port lets pass.

use std::path::{Path, PathBuf};
use std::process::Command;

use nave_tests::process::Process;

use super::load::Load;
use super::subject::{Backend, Subject, find};

pub(super) struct Rival {
    pub(super) name: &'static str,
    /// Names its binary when it is not in PATH.
    variable: &'static str,
    binary: &'static str,
    number: u16,
    /// Its configuration for a load, from the port to listen on and the backend's; none: it does not do that.
    config: fn(Load, u16, u16) -> Option<String>,
    command: fn(&Path, &Path) -> Command,
}

pub(super) const RIVALS: [Rival; 4] = [
    Rival {
        name: "HAProxy",
        variable: "HAPROXY",
        binary: "haproxy",
        number: 0,
        config: haproxy,
        command: haproxy_command,
    },
    Rival {
        name: "nginx",
        variable: "NGINX",
        binary: "nginx",
        number: 1,
        config: nginx,
        command: nginx_command,
    },
    Rival {
        name: "Envoy",
        variable: "ENVOY",
        binary: "envoy",
        number: 2,
        config: envoy,
        command: envoy_command,
    },
    Rival {
        name: "Caddy",
        variable: "CADDY",
        binary: "caddy",
        number: 3,
        config: caddy,
        command: caddy_command,
    },
];

impl Rival {
    /// None when it is not installed, or does not do that.
    pub(super) fn start(
        &self,
        folder: &Path,
        backend: &Backend,
        load: Load,
    ) -> anyhow::Result<Option<Subject>> {
        let named = std::env::var_os(self.variable).map(PathBuf::from);
        let Some(program) = named.or_else(|| find(self.binary)) else { return Ok(None) };
        let port = backend.free_port(self.number);
        let Some(config) = (self.config)(load, port, backend.port(load)?) else { return Ok(None) };
        let file = folder.join(format!("{}-{}.yaml", self.binary, load.service()));
        std::fs::write(&file, config)?;
        let log = folder.join(format!("{}-{}.log", self.binary, load.service()));
        let process = Process::start(self.name, &mut (self.command)(&program, &file), &log)?;
        Ok(Some(Subject::started(process, port)))
    }
}

fn haproxy(load: Load, port: u16, backend: u16) -> Option<String> {
    let (mode, proto) = match load {
        Load::Http1 => ("http", ""),
        Load::Http2 => ("http", " proto h2"),
        Load::Tcp => ("tcp", ""),
    };
    let reuse = if mode == "http" { "http-reuse always" } else { "" };
    Some(format!(
        "global\n nbthread 2\n maxconn 8192\ndefaults\n mode {mode}\n timeout connect 5s\n timeout client 60s\n \
         timeout server 60s\n {reuse}\nfrontend f\n bind 127.0.0.1:{port}{proto}\n default_backend b\nbackend b\n \
         server s 127.0.0.1:{backend}{proto}\n"
    ))
}

fn haproxy_command(program: &Path, config: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("-db").arg("-f").arg(config);
    command
}

/// Its streams of bytes are a module that Debian packages apart; HTTP/2 to an endpoint it speaks for gRPC only.
fn nginx(load: Load, port: u16, backend: u16) -> Option<String> {
    let (kind, pass) = match load {
        Load::Http1 => ("", "proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_pass http://b;"),
        Load::Http2 => (" http2", "grpc_pass grpc://b;"),
        Load::Tcp => return None,
    };
    Some(format!(
        "daemon off; user root; worker_processes 2; pid /tmp/nave-bench-{port}.pid; error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 60s;
  upstream b {{ server 127.0.0.1:{backend}; keepalive 128; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port}{kind}; location / {{ {pass} }} }}
}}
"
    ))
}

fn nginx_command(program: &Path, config: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("-c").arg(config).args(["-e", "stderr"]);
    command
}

fn envoy(load: Load, port: u16, backend: u16) -> Option<String> {
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
                 {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
                 explicit_http_config: {http2_protocol_options: {}}}}";
    let http = "name: envoy.filters.network.http_connection_manager
          typed_config:
            \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
            stat_prefix: f
            route_config: {virtual_hosts: [{name: b, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: b}}]}]}
            http_filters: [{name: envoy.filters.http.router, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]";
    let tcp = "name: envoy.filters.network.tcp_proxy
          typed_config:
            \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
            stat_prefix: f
            cluster: b";
    let filter = if load == Load::Tcp { tcp } else { http };
    let options = if load == Load::Http2 { http2 } else { "" };
    Some(format!(
        "static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
        - {filter}
  clusters:
  - name: b
    connect_timeout: 5s
    {options}
    load_assignment: {{cluster_name: b, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {backend}}}}}}}}}]}}]}}
"
    ))
}

fn envoy_command(program: &Path, config: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--concurrency", "2", "--disable-hot-restart", "-l", "error", "-c"]).arg(config);
    command
}

fn caddy(load: Load, port: u16, backend: u16) -> Option<String> {
    let (listener, transport) = match load {
        Load::Http1 => ("h1", "transport http { keepalive_idle_conns_per_host 128 }"),
        Load::Http2 => ("h1 h2c", "transport http { versions h2c }"),
        Load::Tcp => return None,
    };
    Some(format!(
        "{{\n admin off\n auto_https off\n servers {{\n  protocols {listener}\n }}\n}}\nhttp://127.0.0.1:{port} {{\n \
         reverse_proxy 127.0.0.1:{backend} {{\n  {}\n }}\n}}\n",
        transport.replace("{ ", "{\n   ").replace(" }", "\n  }")
    ))
}

fn caddy_command(program: &Path, config: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--adapter", "caddyfile", "--config"]).arg(config).env("GOMAXPROCS", "2");
    command
}
