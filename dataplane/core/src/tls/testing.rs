//! A CA for tests, and credentials made by the same way that an agent takes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams,
    CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};

use super::check::Chain;
use super::store::make_csr;
use super::{CertStore, Credentials};
use crate::identity::Identity;

pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a test may bend in a certificate. Times are relative to now.
pub struct Bend {
    pub ids: Vec<String>,
    pub from: SystemTime,
    pub until: SystemTime,
    pub usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Bend {
    pub fn plain(identity: &Identity) -> Self {
        let now = SystemTime::now();
        Self {
            ids: vec![identity.to_string()],
            from: now - Duration::from_secs(60),
            until: now + Duration::from_secs(3600),
            usages: vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        }
    }
}

impl Ca {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key can be made");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a CA can be made");
        Self { issuer }
    }

    pub fn root_pem(&self) -> String {
        self.issuer.pem()
    }

    /// Signs a CSR.
    pub fn sign(&self, csr: &str, bend: &Bend) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(csr).expect("a CSR");
        let params = &mut request.params;
        params.not_before = bend.from.into();
        params.not_after = bend.until.into();
        params.extended_key_usages = bend.usages.clone();
        let uri = |id: &String| SanType::URI(id.as_str().try_into().expect("ASCII"));
        params.subject_alt_names = bend.ids.iter().map(uri).collect();
        let signed: Certificate = request.signed_by(&self.issuer).expect("signed");
        signed.pem()
    }

    /// Credentials that passed all checks.
    pub async fn credentials(&self, identity: &Identity) -> Arc<Credentials> {
        let (store, _events) = CertStore::new();
        self.install(&store, identity);
        let wait = Duration::from_secs(5);
        store.get(identity, wait).await.expect("just installed")
    }

    pub fn install(&self, store: &CertStore, identity: &Identity) {
        let csr = store.new_csr(identity).expect("a CSR");
        let leaf = self.sign(&csr, &Bend::plain(identity));
        store
            .install(identity, &[leaf], &[self.root_pem()])
            .expect("a good certificate");
    }

    /// Credentials as a misbehaving peer may hold them: nothing was checked.
    pub fn unchecked(&self, identity: &Identity, bend: &Bend, roots: &[&Ca]) -> Credentials {
        let (csr, key) = make_csr(identity).expect("a CSR");
        let roots: Vec<_> = roots.iter().map(|ca| ca.root_pem()).collect();
        let chain = Chain::parse(&[self.sign(&csr, bend)], &roots).expect("a chain");
        Credentials::new(identity.clone(), chain, key).expect("credentials")
    }
}
