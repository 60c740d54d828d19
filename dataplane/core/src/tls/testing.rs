//! A CA for tests, and credentials made by the same way that an agent takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams,
    CertificateSigningRequestParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SanType,
    SerialNumber,
};

use super::check::Chain;
use super::store::make_csr;
use super::{CertStore, Credentials};
use crate::identity::Identity;

pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// Serial of the newest certificate.
    serial: AtomicU64,
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
        let key = KeyPair::generate().expect("a key can be made");
        let issuer = CertifiedIssuer::self_signed(Self::params(name), key);
        Self::with(issuer.expect("a CA can be made"))
    }

    /// An intermediate of this one, which counts it as its newest certificate.
    pub fn intermediate(&self, name: &str) -> Self {
        let mut params = Self::params(name);
        params.serial_number = Some(self.next_serial());
        let key = KeyPair::generate().expect("a key can be made");
        let issuer = CertifiedIssuer::signed_by(params, key, &self.issuer);
        Self::with(issuer.expect("a CA can be made"))
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    fn with(issuer: CertifiedIssuer<'static, KeyPair>) -> Self {
        Self {
            issuer,
            serial: AtomicU64::new(1000),
        }
    }

    fn next_serial(&self) -> SerialNumber {
        SerialNumber::from(self.serial.fetch_add(1, Relaxed) + 1)
    }

    pub fn last_serial(&self) -> u64 {
        self.serial.load(Relaxed)
    }

    /// PEM of a list that is valid for a day.
    pub fn crl(&self, serials: &[u64]) -> String {
        let now = SystemTime::now();
        let day = Duration::from_secs(86400);
        self.crl_until(serials, now - day, now + day)
    }

    pub fn crl_until(&self, serials: &[u64], from: SystemTime, until: SystemTime) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: from.into(),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: from.into(),
            next_update: until.into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer).expect("a CRL can be made");
        list.pem().expect("PEM")
    }

    pub fn root_pem(&self) -> String {
        self.issuer.pem()
    }

    /// Signs a CSR.
    pub fn sign(&self, csr: &str, bend: &Bend) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(csr).expect("a CSR");
        let params = &mut request.params;
        params.serial_number = Some(self.next_serial());
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
        Credentials::new(identity.clone(), chain, key, Arc::default()).expect("credentials")
    }
}
