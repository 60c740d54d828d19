//! Tests of the certificate store.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::ExtendedKeyUsagePurpose;
use tokio::sync::mpsc::UnboundedReceiver;

use super::testing::{Bend, Ca};
use super::{CertError, CertEvent, CertStore};
use crate::identity::Identity;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(50);

fn web() -> Identity {
    Identity::new("cluster.local", "shop", "web")
}

fn wanted(connection: bool) -> CertEvent {
    CertEvent::Wanted {
        identity: web(),
        connection,
    }
}

fn drained(events: &mut UnboundedReceiver<CertEvent>) -> Vec<CertEvent> {
    std::iter::from_fn(|| events.try_recv().ok()).collect()
}

/// Waits until a connection's need was announced.
async fn asked(events: &mut UnboundedReceiver<CertEvent>) {
    let event = tokio::time::timeout(LONG, events.recv()).await;
    assert_eq!(event.expect("in time"), Some(wanted(true)));
}

fn refusal(store: &CertStore, leaf: String, roots: &[String]) -> String {
    match store.install(&web(), &[leaf], roots) {
        Err(CertError::Invalid(identity, text)) => {
            assert_eq!(identity, web());
            text
        }
        other => panic!("not refused as invalid: {other:?}"),
    }
}

#[test]
fn csr_has_no_subject_and_one_uri_name() {
    let (store, _events) = CertStore::new();
    let pem = store.new_csr(&web()).unwrap();
    assert!(pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----"));
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    use x509_parser::prelude::FromDer;
    let (_, csr) =
        x509_parser::certification_request::X509CertificationRequest::from_der(&block.contents)
            .unwrap();
    let info = &csr.certification_request_info;
    assert_eq!(info.subject.iter().count(), 0);
    let names: Vec<_> = csr
        .requested_extensions()
        .unwrap()
        .filter_map(|e| match e {
            x509_parser::extensions::ParsedExtension::SubjectAlternativeName(names) => {
                Some(names.general_names.clone())
            }
            _ => None,
        })
        .flatten()
        .collect();
    let uri = x509_parser::extensions::GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(names, vec![uri]);
    // id-ecPublicKey, and a P-256 point.
    let key = &info.subject_pki;
    assert_eq!(key.algorithm.algorithm.to_string(), "1.2.840.10045.2.1");
    assert_eq!(key.subject_public_key.data.len(), 65);
}

#[tokio::test]
async fn installed_certificate_is_handed_out_with_its_serial_and_times() {
    let (store, _events) = CertStore::new();
    let ca = Ca::new("root");
    ca.install(&store, &web());
    let credentials = store.get(&web(), SHORT).await.unwrap();
    assert_eq!(credentials.identity, web());
    let status = store.status();
    assert_eq!(status.len(), 1);
    assert_eq!(status[0].serial, credentials.serial);
    assert!(status[0].serial.bytes().all(|b| b.is_ascii_digit()));
    assert_eq!(status[0].not_after, Some(credentials.not_after));
    assert_eq!(status[0].error, "");
}

#[test]
fn install_says_which_check_failed_and_keeps_the_pending_key() {
    let (store, _events) = CertStore::new();
    let ca = Ca::new("root");
    let roots = [ca.root_pem()];
    let plain = Bend::plain(&web());

    let text = refusal(&store, ca.root_pem(), &roots);
    assert!(text.contains("no key waits"), "{text}");

    let old = store.new_csr(&web()).unwrap();
    let csr = store.new_csr(&web()).unwrap();
    let text = refusal(&store, ca.sign(&old, &plain), &roots);
    assert!(text.contains("isn't for the key"), "{text}");

    let ids = vec![Identity::new("cluster.local", "shop", "db").to_string()];
    let bend = Bend {
        ids,
        ..Bend::plain(&web())
    };
    let text = refusal(&store, ca.sign(&csr, &bend), &roots);
    assert!(text.contains("/sa/db, not for this identity"), "{text}");

    let bend = Bend {
        ids: Vec::new(),
        ..Bend::plain(&web())
    };
    let text = refusal(&store, ca.sign(&csr, &bend), &roots);
    assert!(text.contains("no SPIFFE URI SAN"), "{text}");

    let ids = vec![
        web().to_string(),
        "spiffe://cluster.local/ns/a/sa/b".to_owned(),
    ];
    let bend = Bend {
        ids,
        ..Bend::plain(&web())
    };
    let text = refusal(&store, ca.sign(&csr, &bend), &roots);
    assert!(text.contains("further SPIFFE"), "{text}");

    let now = SystemTime::now();
    let bend = Bend {
        from: now - Duration::from_secs(600),
        until: now - Duration::from_secs(300),
        ..Bend::plain(&web())
    };
    let text = refusal(&store, ca.sign(&csr, &bend), &roots);
    assert!(text.contains("expired 30"), "{text}");

    let bend = Bend {
        from: now + Duration::from_secs(600),
        ..Bend::plain(&web())
    };
    let text = refusal(&store, ca.sign(&csr, &bend), &roots);
    assert!(text.contains("clock"), "{text}");

    let foreign = [Ca::new("other").root_pem()];
    let text = refusal(&store, ca.sign(&csr, &plain), &foreign);
    assert!(text.contains("doesn't lead to the given roots"), "{text}");

    let bend = Bend {
        usages: vec![ExtendedKeyUsagePurpose::ServerAuth],
        ..Bend::plain(&web())
    };
    let text = refusal(&store, ca.sign(&csr, &bend), &roots);
    assert!(text.contains("as client"), "{text}");

    let text = refusal(&store, "nonsense".to_owned(), &roots);
    assert!(text.contains("chain: no certificate"), "{text}");
    let text = refusal(&store, ca.sign(&csr, &plain), &[]);
    assert!(text.contains("roots: no certificate"), "{text}");
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned();
    let text = refusal(&store, broken.clone(), &roots);
    assert!(text.contains("isn't a certificate"), "{text}");
    let text = refusal(&store, ca.sign(&csr, &plain), &[broken]);
    assert!(text.contains("not usable as a CA"), "{text}");

    store
        .install(&web(), &[ca.sign(&csr, &plain)], &roots)
        .unwrap();
}

#[tokio::test]
async fn failed_renewal_keeps_the_valid_certificate_and_shows_the_error() {
    let (store, _events) = CertStore::new();
    let ca = Ca::new("root");
    ca.install(&store, &web());
    let before = store.get(&web(), SHORT).await.unwrap();
    store.new_csr(&web()).unwrap();
    store.fail(&web(), "CA away");
    refusal(&store, ca.root_pem(), &[ca.root_pem()]);
    let after = store.get(&web(), SHORT).await.unwrap();
    assert!(Arc::ptr_eq(&before, &after));
    assert_eq!(store.status()[0].error, "CA away");
    ca.install(&store, &web());
    assert_eq!(store.status()[0].error, "");
}

#[tokio::test]
async fn expired_certificate_is_never_handed_out() {
    let (store, mut events) = CertStore::new();
    let ca = Ca::new("root");
    let csr = store.new_csr(&web()).unwrap();
    // Certificates count in whole seconds.
    let bend = Bend {
        until: SystemTime::now() + Duration::from_secs(2),
        ..Bend::plain(&web())
    };
    store
        .install(&web(), &[ca.sign(&csr, &bend)], &[ca.root_pem()])
        .unwrap();
    let not_after = store.get(&web(), SHORT).await.unwrap().not_after;
    while SystemTime::now() < not_after {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused = store.get(&web(), SHORT).await.err();
    assert!(
        matches!(refused, Some(CertError::Expired(_))),
        "{refused:?}"
    );
    assert_eq!(drained(&mut events), vec![wanted(true)]);
    store.fail(&web(), "CA away");
    let refused = store.get(&web(), LONG).await.err().unwrap().to_string();
    assert!(refused.contains("expired") && refused.contains("CA away"));
    ca.install(&store, &web());
    store.get(&web(), SHORT).await.unwrap();
}

#[tokio::test]
async fn waiting_connections_ask_once_and_are_woken_by_the_certificate() {
    let (store, mut events) = CertStore::new();
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.get(&web(), LONG).await.map(|c| c.serial.clone()) })
        })
        .collect();
    asked(&mut events).await;
    Ca::new("root").install(&store, &web());
    for waiter in waiters {
        waiter.await.unwrap().unwrap();
    }
    assert_eq!(drained(&mut events), vec![]);
}

#[tokio::test]
async fn failure_wakes_those_who_wait_and_later_ones_get_it_at_once() {
    let (store, mut events) = CertStore::new();
    store.retain(&web());
    assert_eq!(drained(&mut events), vec![wanted(false)]);
    let waiter = tokio::spawn({
        let store = store.clone();
        async move { store.get(&web(), LONG).await.err() }
    });
    asked(&mut events).await;
    store.fail(&web(), "not authorised");
    let text = waiter.await.unwrap().unwrap().to_string();
    assert!(text.contains("not authorised"), "{text}");
    let later = store.get(&web(), LONG).await.err();
    assert!(matches!(later, Some(CertError::Failed(..))), "{later:?}");
}

#[tokio::test]
async fn wait_is_bounded_and_asks_again_next_time() {
    let (store, mut events) = CertStore::new();
    for _ in 0..2 {
        let refused = store.get(&web(), SHORT).await.err();
        assert!(matches!(refused, Some(CertError::Timeout(..))));
        assert_eq!(drained(&mut events), vec![wanted(true)]);
    }
    assert!(store.status().is_empty(), "nothing is kept for strangers");
}

#[tokio::test]
async fn last_release_forgets_certificate_and_wakes_waiters() {
    let (store, mut events) = CertStore::new();
    store.retain(&web());
    store.retain(&web());
    assert_eq!(drained(&mut events), vec![wanted(false)]);
    Ca::new("root").install(&store, &web());
    store.release(&web());
    store.get(&web(), SHORT).await.unwrap();
    assert_eq!(drained(&mut events), vec![]);
    store.release(&web());
    let forgotten = CertEvent::Forgotten { identity: web() };
    assert_eq!(drained(&mut events), vec![forgotten]);
    assert!(store.status().is_empty());
    store.release(&web());
    assert_eq!(drained(&mut events), vec![]);

    store.retain(&web());
    drained(&mut events);
    let waiter = tokio::spawn({
        let store = store.clone();
        async move { store.get(&web(), LONG).await.err() }
    });
    asked(&mut events).await;
    store.release(&web());
    let text = waiter.await.unwrap().unwrap().to_string();
    assert!(text.contains("any more"), "{text}");
}

#[test]
fn dump_has_the_shape_istioctl_reads() {
    let (store, _events) = CertStore::new();
    let ca = Ca::new("root");
    ca.install(&store, &web());
    store.retain(&Identity::new("cluster.local", "a", "early"));
    let failed = Identity::new("cluster.local", "b", "failed");
    store.retain(&failed);
    store.fail(&failed, "CA away");
    let dump = store.dump();
    assert_eq!(dump[0]["state"], "Initializing");
    assert_eq!(dump[1]["state"], "Unavailable: CA away");
    assert_eq!(dump[2]["state"], "Available");
    assert_eq!(dump[2]["identity"], web().to_string());
    let leaf = &dump[2]["certChain"][0];
    assert_eq!(leaf["serialNumber"], store.status()[2].serial.as_str());
    assert!(
        leaf["pem"]
            .as_str()
            .unwrap()
            .starts_with("LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t")
    );
    let until = leaf["expirationTime"].as_str().unwrap();
    assert!(
        until.len() == 20 && until.ends_with('Z') && until.starts_with("20"),
        "{until}"
    );
    assert_eq!(dump[2]["rootCerts"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_key_that_the_issuer_made_comes_with_its_certificate() {
    let (store, _events) = CertStore::new();
    let ca = Ca::new("root");
    let pair = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default()
        .serialize_request(&pair)
        .unwrap();
    let leaf = ca.sign(&csr.pem().unwrap(), &Bend::plain(&web()));
    let roots = [ca.root_pem()];
    for key in [pair.serialize_der(), pair.serialize_pem().into_bytes()] {
        store
            .install_with_key(&web(), std::slice::from_ref(&leaf), &roots, &key)
            .unwrap();
        assert!(store.get(&web(), SHORT).await.is_ok());
    }
    let other = rcgen::KeyPair::generate().unwrap().serialize_der();
    let refused = store.install_with_key(&web(), std::slice::from_ref(&leaf), &roots, &other);
    assert!(refused.is_err(), "not the key of this leaf");
    let refused = store.install_with_key(&web(), &[leaf], &roots, b"nonsense");
    let text = refused.expect_err("no key").to_string();
    assert!(text.contains("private key: "), "{text}");
}
