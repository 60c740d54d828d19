//! SetTrust as an agent says it.

use super::*;
use crate::tls::testing::Ca;

async fn set(agent: &mut Client, trust: pb::SetTrust) -> Body {
    agent.ask(Ask::SetTrust(trust), vec![]).await
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_by_its_field_and_changes_nothing() {
    let plane = Plane::start();
    let mut agent = plane.agent().await;
    let ca = Ca::new("root");
    let good = pb::SetTrust {
        crl: ca.crl(&[1, 2]).into(),
        trust_domain_aliases: vec!["old.domain".into()],
        ..Default::default()
    };
    done(set(&mut agent, good.clone()).await);
    let bad = pb::SetTrust {
        crl: "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".into(),
        ..Default::default()
    };
    let (code, text) = error(set(&mut agent, bad).await);
    assert_eq!(code, Code::Invalid);
    assert!(text.starts_with("crl: block 1: "), "{text}");
    let trust = plane.instance.certs.trust.trust();
    assert_eq!(trust.crls.len(), 2);
    let node = plane.instance.node().expect("configured");
    let domains = node.shared.store.snapshot().policies().domains().len();
    assert_eq!(domains, 2, "ours and the alias");
    // The next one counts as a whole.
    drop(trust);
    done(set(&mut agent, pb::SetTrust::default()).await);
    assert_eq!(plane.instance.certs.trust.trust().crls.len(), 0);
    assert!(node.shared.store.snapshot().policies().domains().is_empty());
}

#[tokio::test]
async fn an_observer_may_not_change_trust() {
    let plane = Plane::start();
    plane.agent().await;
    let mut observer = plane.role(Role::Observer).await;
    let (code, _) = error(set(&mut observer, pb::SetTrust::default()).await);
    assert_eq!(code, Code::Permission);
}
