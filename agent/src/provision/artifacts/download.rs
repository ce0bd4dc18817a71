//! What a URL leads to, as the stub reads it: a file of this host, or what a server gives over http or https.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::CertificateError;
use rustls::crypto::aws_lc_rs;
use ureq::tls::{RootCerts, TlsConfig};

use super::roots;

/// An artifact as it is fetched.
const BYTES_MAX: u64 = 2 << 30;
const TIMEOUT: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

const STRANGER: &str = "its server's certificate is of an authority that this host does not trust: add that to the \
                        host's CA certificates, or start the agent with SSL_CERT_FILE naming a file that has it";

/// Copies it. `ca_bundle`: a file of authorities to be trusted in place of the host's own.
pub(super) fn download(url: &str, ca_bundle: Option<&Path>, out: &mut impl Write) -> Result<(), String> {
    let mut body: Box<dyn Read> = match url.strip_prefix("file://") {
        Some(path) => Box::new(open(Path::new(path))?),
        None => Box::new(ask(url, ca_bundle)?),
    };
    let copied = io::copy(&mut body.by_ref().take(BYTES_MAX + 1), out).map_err(|e| e.to_string())?;
    out.flush().map_err(|e| e.to_string())?;
    match copied > BYTES_MAX {
        true => Err(format!("has more than {BYTES_MAX} bytes")),
        false => Ok(()),
    }
}

/// A FIFO or a device is never waited for.
fn open(path: &Path) -> Result<File, String> {
    let mut open = OpenOptions::new();
    let file = open.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|e| e.to_string())?;
    match file.metadata().map_err(|e| e.to_string())?.is_file() {
        true => Ok(file),
        false => Err("is not a file".to_owned()),
    }
}

fn ask(url: &str, ca_bundle: Option<&Path>) -> Result<impl Read + use<>, String> {
    let roots = match roots::trusted(ca_bundle) {
        Ok(roots) => roots,
        // Nobody is trusted, and nobody has to be.
        Err(_) if url.starts_with("http://") => RootCerts::new_with_certs(&[]),
        Err(why) => return Err(why),
    };
    let tls = TlsConfig::builder()
        .unversioned_rustls_crypto_provider(Arc::new(aws_lc_rs::default_provider()))
        .root_certs(roots)
        .build();
    let config = ureq::Agent::config_builder()
        .tls_config(tls)
        .timeout_global(Some(TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .user_agent(concat!("nave/", env!("CARGO_PKG_VERSION")))
        .build();
    let answer = config.new_agent().get(url).call().map_err(|error| told(&error))?;
    Ok(answer.into_body().into_reader())
}

fn told(error: &ureq::Error) -> String {
    let stranger = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    match error {
        ureq::Error::Rustls(error) if *error == stranger => STRANGER.to_owned(),
        ureq::Error::Io(error) => {
            match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(inner) if *inner == stranger => STRANGER.to_owned(),
                // Without saying first that it is one.
                _ => error.to_string(),
            }
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};
    use std::thread::JoinHandle;

    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use rustls::{ServerConfig, ServerConnection, StreamOwned};

    use super::*;

    const BODY: &str = "what was asked for";

    /// An authority of its own, in PEM, and what a server of 127.0.0.1 needs that it vouches for.
    fn authority(name: &str) -> (String, Arc<ServerConfig>) {
        let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, name);
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = ca.self_signed(&ca_key).unwrap().pem();
        let leaf = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        (pem, Arc::new(config))
    }

    /// Answers one call, or sees it fail.
    fn serve(config: Arc<ServerConfig>) -> (SocketAddr, JoinHandle<io::Result<()>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let served = std::thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            let connection = ServerConnection::new(config).map_err(io::Error::other)?;
            let mut stream = StreamOwned::new(connection, stream);
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                request.push(byte[0]);
            }
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len())?;
            stream.flush()
        });
        (address, served)
    }

    #[test]
    fn over_https_a_server_is_trusted_by_its_authority_alone() {
        let dir = tempfile::tempdir().unwrap();
        let [ours, anothers] = ["ours.pem", "anothers.pem"].map(|name| dir.path().join(name));
        let (pem, config) = authority("ours");
        std::fs::write(&ours, pem).unwrap();
        std::fs::write(&anothers, authority("another's").0).unwrap();

        let (address, served) = serve(config.clone());
        let mut got = Vec::new();
        download(&format!("https://{address}/tool"), Some(&ours), &mut got).unwrap();
        assert_eq!(String::from_utf8(got).unwrap(), BODY);
        served.join().unwrap().unwrap();

        let (address, served) = serve(config);
        let refused = download(&format!("https://{address}/tool"), Some(&anothers), &mut io::sink());
        assert_eq!(refused.unwrap_err(), STRANGER);
        served.join().unwrap().unwrap_err();
    }

    #[test]
    fn without_authorities_https_alone_is_refused() {
        let absent = Path::new("/nowhere/authorities.pem");
        let refused = download("https://127.0.0.1:1/tool", Some(absent), &mut io::sink()).unwrap_err();
        assert!(refused.contains("/nowhere/authorities.pem"), "{refused}");
        // Nobody listens there, which is all that is amiss.
        let unreached = download("http://127.0.0.1:1/tool", Some(absent), &mut io::sink()).unwrap_err();
        assert!(unreached.contains("refused"), "{unreached}");
    }
}
