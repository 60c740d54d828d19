//! Tests of revocation lists: what can be read, and what a list says of a chain.

use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};

use super::crl::Crls;
use super::judge::{Role, path};
use super::path::Path;
use super::store::make_csr;
use super::testing::{Bend, Ca};
use super::trust::anchor;
use crate::identity::Identity;

fn crls(text: impl AsRef<[u8]>) -> Crls {
    Crls::parse(text.as_ref()).unwrap()
}

fn refusal(text: impl AsRef<[u8]>) -> String {
    Crls::parse(text.as_ref()).expect_err("unreadable")
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

/// A leaf of `issuer`, proved against `root` by way of `between`.
fn proved(issuer: &Ca, between: &[&Ca], root: &Ca) -> Path {
    let web = Identity::new("cluster.local", "shop", "web");
    let (csr, _) = make_csr(&web).unwrap();
    let leaf = der(&issuer.sign(&csr, &Bend::plain(&web)));
    let rest: Vec<_> = between.iter().map(|ca| der(&ca.root_pem())).collect();
    let anchors = [anchor(&der(&root.root_pem())).unwrap()];
    path(&leaf, &rest, &anchors, UnixTime::now(), Role::Client).unwrap()
}

#[test]
fn one_list_in_der_or_several_in_pem_are_read() {
    let (one, other) = (Ca::new("one"), Ca::new("other"));
    let pem = one.crl(&[7, 8]);
    let list = CertificateRevocationListDer::from_pem_slice(pem.as_bytes()).unwrap();
    assert_eq!(crls(&list).len(), 2);
    assert_eq!(
        crls(format!("{pem}\n# a comment\n{}", other.crl(&[9]))).len(),
        3
    );
    // What else is in the file isn't ours to judge.
    assert_eq!(crls(format!("{}{pem}", one.root_pem())).len(), 2);
}

#[test]
fn nothing_is_no_list_and_an_empty_list_revokes_nobody() {
    assert_eq!(crls("").len(), 0);
    assert_eq!(crls(" \n\n").len(), 0);
    let ca = Ca::new("root");
    let list = crls(ca.crl(&[]));
    assert!(list.revoked(&proved(&ca, &[], &ca)).is_none());
}

#[test]
fn what_cannot_be_read_is_named() {
    let ca = Ca::new("root");
    let text = refusal("nonsense");
    assert!(text.contains("neither PEM nor a list in DER"), "{text}");
    let text = refusal(ca.root_pem());
    assert!(text.contains("no X509 CRL block"), "{text}");
    let broken = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    let text = refusal(format!("{}{broken}", ca.crl(&[1])));
    assert!(text.contains("block 2"), "{text}");
    let pem = ca.crl(&[1]);
    let list = CertificateRevocationListDer::from_pem_slice(pem.as_bytes()).unwrap();
    let text = refusal(&list[..list.len() - 1]);
    assert!(text.contains("in DER"), "truncated: {text}");
    // Unknown algorithm: the last arc of ecdsa-with-SHA256, in both places.
    let mut odd = list.to_vec();
    let oid = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    for at in 0..odd.len() - oid.len() {
        if odd[at..at + oid.len()] == oid {
            odd[at + oid.len() - 1] = 0x7f;
        }
    }
    let text = refusal(&odd);
    assert!(text.contains("signature algorithm isn't known"), "{text}");
}

#[test]
fn a_serial_is_revoked_by_its_own_issuer_alone() {
    let (ca, other) = (Ca::new("root"), Ca::new("other"));
    let path = proved(&ca, &[], &ca);
    let serial = ca.last_serial();
    assert!(crls(other.crl(&[serial])).revoked(&path).is_none());
    assert!(crls(ca.crl(&[serial + 1])).revoked(&path).is_none());
    let list = crls(ca.crl(&[3, serial]));
    let link = list.revoked(&path).expect("revoked");
    assert_eq!(link.serial(), format!("{serial:x}"));
}

#[test]
fn a_list_by_another_key_of_the_same_name_says_nothing() {
    let (ca, namesake) = (Ca::new("root"), Ca::new("root"));
    let path = proved(&ca, &[], &ca);
    let serial = ca.last_serial();
    let foreign = namesake.crl(&[serial]);
    assert!(crls(&foreign).revoked(&path).is_none());
    // It doesn't hide the right one either.
    let both = format!("{foreign}{}", ca.crl(&[serial]));
    assert!(crls(both).revoked(&path).is_some());
}

#[test]
fn the_whole_chain_is_looked_at() {
    let root = Ca::new("root");
    let middle = root.intermediate("middle");
    let of_middle = root.last_serial();
    let path = proved(&middle, &[&middle], &root);
    let link = crls(root.crl(&[of_middle]));
    assert!(link.revoked(&path).is_some(), "the intermediate");
    let leaf = crls(middle.crl(&[middle.last_serial()]));
    assert!(leaf.revoked(&path).is_some(), "the leaf");
    let wrong = crls(root.crl(&[middle.last_serial() + 500]));
    assert!(wrong.revoked(&path).is_none());
}

#[test]
fn an_expired_list_is_honoured() {
    let ca = Ca::new("root");
    let path = proved(&ca, &[], &ca);
    let day = Duration::from_secs(86400);
    let now = SystemTime::now();
    let old = ca.crl_until(&[ca.last_serial()], now - day * 3, now - day);
    assert!(crls(old).revoked(&path).is_some());
}
