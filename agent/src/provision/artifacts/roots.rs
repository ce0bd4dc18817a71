//! The authorities that whoever fetches over https trusts: those of the host itself, so that an authority of a company
//! that its hosts know is known here too, and none of ours that would grow old. Read by the stub, which is nobody.

use std::path::Path;

use ureq::tls::{PemItem, RootCerts, parse_pem};

/// Where distributions keep them, all in one file.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt", // Debian, Ubuntu, Arch, Alpine
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // Fedora, RHEL
    "/etc/pki/tls/certs/ca-bundle.crt",   // older ones of those
    "/etc/ssl/ca-bundle.pem",             // openSUSE
    "/etc/ssl/cert.pem",                  // Alpine without its package
];

const NONE: &str = "this host has no CA certificates, so nothing is fetched over https: install its package \
                    ca-certificates, or start the agent with SSL_CERT_FILE naming a file of them in PEM";

/// Those in the named file, else those of the host. The error is for people.
pub(super) fn trusted(named: Option<&Path>) -> Result<RootCerts, String> {
    match named {
        Some(bundle) => read(bundle).map_err(|why| format!("{why} (SSL_CERT_FILE names it)")),
        None => read_first(BUNDLES.iter().map(Path::new)),
    }
}

fn read_first<'b>(mut bundles: impl Iterator<Item = &'b Path>) -> Result<RootCerts, String> {
    bundles.find(|bundle| bundle.exists()).map_or_else(|| Err(NONE.to_owned()), read)
}

fn read(bundle: &Path) -> Result<RootCerts, String> {
    let shown = bundle.display();
    let pem = std::fs::read(bundle)
        .map_err(|e| format!("CA certificates cannot be read: {shown}: {e}; let everybody read it"))?;
    let certificates: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            Ok(_) | Err(_) => None,
        })
        .collect();
    match certificates.is_empty() {
        true => Err(format!("there are no CA certificates in {shown}; fill it with some in PEM")),
        false => Ok(certificates.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(roots: &RootCerts) -> usize {
        match roots {
            RootCerts::Specific(certificates) => certificates.len(),
            other => panic!("not those of the file: {other:?}"),
        }
    }

    #[test]
    fn the_first_bundle_that_is_there_is_taken_and_what_lacks_is_said_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let [absent, empty, good] = ["absent", "empty", "good"].map(|name| dir.path().join(name));
        let key = rcgen::KeyPair::generate().unwrap();
        let authority = rcgen::CertificateParams::default().self_signed(&key).unwrap().pem();
        std::fs::write(&empty, "no certificate\n").unwrap();
        std::fs::write(&good, format!("# two of them\n{authority}\n{authority}")).unwrap();

        let found = read_first([absent.as_path(), &good, &empty].into_iter()).unwrap();
        assert_eq!(count(&found), 2);
        assert_eq!(count(&trusted(Some(&good)).unwrap()), 2);
        let none = read_first([absent.as_path()].into_iter()).unwrap_err();
        assert!(none.contains("install its package ca-certificates"), "{none}");
        let nothing = trusted(Some(&empty)).unwrap_err();
        assert!(nothing.starts_with("there are no CA certificates in /"), "{nothing}");
        let missing = trusted(Some(&absent)).unwrap_err();
        assert!(
            missing.contains("No such file") && missing.ends_with("(SSL_CERT_FILE names it)"),
            "{missing}"
        );
    }
}
