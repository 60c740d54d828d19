//! One entry an identity: the key that waits for its certificate, the certificate in use, who needs
//! it, and who waits for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::crypto::aws_lc_rs::sign::{any_ecdsa_type, any_supported_type};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::SigningKey;
use tokio::sync::{Notify, mpsc};
use zeroize::{Zeroize, Zeroizing};

use super::base::TrustBase;
use super::check::Chain;
use super::credentials::Credentials;
use super::trust::{Compliance, Trust};
use super::{CertError, CertEvent, CertStatus, dump};
use crate::identity::Identity;

/// A cut tunnel is gone as soon as its task runs.
const CUT_PATIENCE: Duration = Duration::from_secs(5);

/// Certificates by identity. An entry lives while a local workload has the identity, somebody
/// waits for it, or the agent put something into it.
pub struct CertStore {
    /// How peers are judged, and the tunnels that were let in.
    pub trust: Arc<TrustBase>,
    entries: RwLock<HashMap<Identity, Entry>>,
    /// Held while trust changes.
    changing: tokio::sync::Mutex<()>,
    events: mpsc::UnboundedSender<CertEvent>,
}

#[derive(Default)]
struct Entry {
    /// Local workloads with this identity.
    retained: usize,
    /// Key of the newest CSR.
    pending: Option<Arc<dyn SigningKey>>,
    current: Option<Arc<Credentials>>,
    /// Of the last failed fetch since the last success.
    error: String,
    waiting: usize,
    /// A connection's need was announced and not answered yet.
    asked: bool,
    changed: Arc<Notify>,
}

/// What a look at an entry said.
enum Look {
    Usable(Arc<Credentials>),
    Refused(CertError),
    Wait(Arc<Notify>),
}

/// One waiter; also when its future is dropped.
struct Waiting<'a> {
    store: &'a CertStore,
    identity: &'a Identity,
}

impl CertStore {
    /// Events are never dropped; the receiver belongs to the control socket.
    pub fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<CertEvent>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let store = Self {
            trust: Arc::default(),
            entries: RwLock::default(),
            changing: tokio::sync::Mutex::default(),
            events,
        };
        (Arc::new(store), receiver)
    }

    /// The usable certificate, waiting up to `wait` for it. Never an expired one. While a failed
    /// fetch has left its error and no certificate, the error is returned at once.
    pub async fn get(
        &self,
        identity: &Identity,
        wait: Duration,
    ) -> Result<Arc<Credentials>, CertError> {
        if let Some(current) = self.usable(identity) {
            return Ok(current);
        }
        let waiting = self.wait_for(identity);
        let usable = async {
            loop {
                let changed = match waiting.look() {
                    Look::Usable(credentials) => return Ok(credentials),
                    Look::Refused(error) => return Err(error),
                    Look::Wait(changed) => changed,
                };
                let woken = changed.notified();
                // What happened before `woken` existed isn't missed: look again.
                match waiting.look() {
                    Look::Usable(credentials) => return Ok(credentials),
                    Look::Refused(error) => return Err(error),
                    Look::Wait(same) if Arc::ptr_eq(&same, &changed) => woken.await,
                    Look::Wait(_) => {}
                }
            }
        };
        match tokio::time::timeout(wait, usable).await {
            Ok(result) => result,
            Err(_) => Err(self.timed_out(identity, wait)),
        }
    }

    /// Announces that a local workload has this identity (prefetch). Counted: `release` undoes.
    pub fn retain(&self, identity: &Identity) {
        let mut entries = self.entries.write();
        let entry = entries.entry(identity.clone()).or_default();
        entry.retained += 1;
        if entry.retained == 1 && entry.current.is_none() {
            self.send(CertEvent::Wanted {
                identity: identity.clone(),
                connection: false,
            });
        }
    }

    /// The last release forgets certificate and key and sends `Forgotten`.
    pub fn release(&self, identity: &Identity) {
        let mut entries = self.entries.write();
        let Some(entry) = entries.get_mut(identity).filter(|e| e.retained > 0) else {
            return;
        };
        entry.retained -= 1;
        if entry.retained > 0 {
            return;
        }
        if let Some(entry) = entries.remove(identity) {
            entry.changed.notify_waiters();
        }
        self.send(CertEvent::Forgotten {
            identity: identity.clone(),
        });
    }

    /// PEM of a CSR with a new P-256 key (facts ztunnel 8.1). The key replaces an older pending
    /// one and isn't kept in any serialised form.
    pub fn new_csr(&self, identity: &Identity) -> Result<String, CertError> {
        let invalid = |text: String| CertError::Invalid(identity.clone(), text);
        let (csr, key) = make_csr(identity).map_err(invalid)?;
        let mut entries = self.entries.write();
        entries.entry(identity.clone()).or_default().pending = Some(key);
        Ok(csr)
    }

    /// Takes a certificate for the pending key into use, or says which check failed and changes
    /// nothing: what was valid before goes on serving.
    pub fn install(
        &self,
        identity: &Identity,
        chain_pem: &[String],
        roots_pem: &[String],
    ) -> Result<CertStatus, CertError> {
        let invalid = |text: String| CertError::Invalid(identity.clone(), text);
        let pending = |entry: Option<&Entry>| entry.and_then(|e| e.pending.clone());
        let key = pending(self.entries.read().get(identity))
            .ok_or_else(|| invalid("no key waits for a certificate: make a CSR first".into()))?;
        let chain = Chain::parse(chain_pem, roots_pem).map_err(invalid)?;
        chain
            .check(identity, &key, &self.trust, SystemTime::now())
            .map_err(invalid)?;
        let credentials =
            Credentials::new(identity.clone(), chain, key.clone(), self.trust.clone())
                .map_err(invalid)?;

        let mut entries = self.entries.write();
        let entry = entries
            .get_mut(identity)
            .filter(|e| e.pending.as_ref().is_some_and(|p| Arc::ptr_eq(p, &key)))
            .ok_or_else(|| invalid("forgotten, or a newer CSR was made meanwhile".into()))?;
        entry.pending = None;
        let old = entry.current.replace(Arc::new(credentials));
        entry.error.clear();
        entry.answer();
        let status = entry.status(identity);
        let renewed = old.is_some();
        let same_roots = old.is_none_or(|old| entry.has_roots(&old.roots));
        drop(entries);
        if renewed {
            // Who comes next is on a tunnel that the new certificate proved, and so outlives
            // whatever ends with the old one: its lifetime, its issuer, a root.
            self.trust.retire(identity);
        }
        if !same_roots {
            let cut = self.recheck(|owner| owner == identity);
            tracing::info!(%identity, cut, "roots changed");
        }
        Ok(status)
    }

    /// As `install`, with a key that the issuer made: PKCS#8, PEM or DER. The caller wipes it.
    pub fn install_with_key(
        &self,
        identity: &Identity,
        chain_pem: &[String],
        roots_pem: &[String],
        key: &[u8],
    ) -> Result<CertStatus, CertError> {
        let invalid = |text: String| CertError::Invalid(identity.clone(), text);
        let key = signing_key(key).map_err(|text| invalid(format!("private key: {text}")))?;
        self.entries
            .write()
            .entry(identity.clone())
            .or_default()
            .pending = Some(key);
        self.install(identity, chain_pem, roots_pem)
    }

    /// Judges peers by this from now on; returns once live tunnels that it no longer covers have
    /// ended: how many.
    pub async fn set_trust(&self, trust: Trust) -> usize {
        let _changing = self.changing.lock().await;
        let compliance = trust.compliance;
        let before = self.trust.replace(trust);
        if before.compliance != compliance {
            self.comply(compliance);
        }
        let cut = self.recheck(|_| true);
        // Who doesn't end has a defect; the agent isn't to wait for it.
        let _ = tokio::time::timeout(CUT_PATIENCE, self.trust.none_cut()).await;
        cut
    }

    /// Wakes those who wait with this text as their error. A valid certificate goes on serving.
    pub fn fail(&self, identity: &Identity, text: &str) {
        if let Some(entry) = self.entries.write().get_mut(identity) {
            entry.error = match text.is_empty() {
                true => "the fetch failed without a reason".to_owned(),
                false => text.to_owned(),
            };
            entry.answer();
        }
    }

    /// Sorted by identity.
    pub fn status(&self) -> Vec<CertStatus> {
        let entries = self.entries.read();
        let mut all: Vec<_> = entries.iter().map(|(id, e)| e.status(id)).collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// The `certificates` section of the dump (facts ztunnel 13.1).
    pub fn dump(&self) -> serde_json::Value {
        let mut entries: Vec<_> = {
            let entries = self.entries.read();
            let part = |(id, e): (&Identity, &Entry)| {
                (id.clone(), e.usable(), e.unavailable().unwrap_or_default())
            };
            entries.iter().map(part).collect()
        };
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries
            .iter()
            .map(|(id, current, error)| dump::entry(id, current.as_deref(), error))
            .collect()
    }

    /// Certificates stay, their TLS configurations change. One that was installed meanwhile was made
    /// under the new policy.
    fn comply(&self, compliance: Compliance) {
        let mut entries = self.entries.write();
        for entry in entries.values_mut() {
            // What was built once can be built again.
            if let Some(Ok(changed)) = entry.current.as_ref().map(|c| c.complying(compliance)) {
                entry.current = Some(Arc::new(changed));
            }
        }
    }

    fn recheck(&self, concerned: impl Fn(&Identity) -> bool) -> usize {
        let judges: HashMap<_, _> = {
            let entries = self.entries.read();
            let current = entries.iter().filter(|(identity, _)| concerned(identity));
            current
                .filter_map(|(id, e)| Some((id.clone(), e.current.as_ref()?.judge.clone())))
                .collect()
        };
        self.trust
            .recheck(&concerned, |owner| judges.get(owner).cloned())
    }

    fn usable(&self, identity: &Identity) -> Option<Arc<Credentials>> {
        self.entries.read().get(identity)?.usable()
    }

    fn wait_for<'a>(&'a self, identity: &'a Identity) -> Waiting<'a> {
        let mut entries = self.entries.write();
        entries.entry(identity.clone()).or_default().waiting += 1;
        Waiting {
            store: self,
            identity,
        }
    }

    fn timed_out(&self, identity: &Identity, wait: Duration) -> CertError {
        match self.entries.read().get(identity) {
            Some(entry) if entry.current.is_some() => CertError::Expired(identity.clone()),
            _ => CertError::Timeout(identity.clone(), wait),
        }
    }

    fn send(&self, event: CertEvent) {
        // The receiver goes only when the process ends.
        let _ = self.events.send(event);
    }
}

impl Entry {
    fn usable(&self) -> Option<Arc<Credentials>> {
        let now = SystemTime::now();
        self.current.clone().filter(|c| c.valid_at(now))
    }

    /// Why there is no certificate, once that is known.
    fn unavailable(&self) -> Option<String> {
        match (&self.current, self.error.as_str()) {
            (_, "") => None,
            (None, error) => Some(error.to_owned()),
            (Some(_), error) => Some(format!("the last one expired, and its renewal: {error}")),
        }
    }

    fn has_roots(&self, roots: &[CertificateDer<'_>]) -> bool {
        let current = self.current.as_ref();
        current.is_some_and(|c| roots.iter().all(|root| c.roots.contains(root)))
    }

    /// An answer came, good or bad.
    fn answer(&mut self) {
        self.asked = false;
        self.changed.notify_waiters();
    }

    fn status(&self, identity: &Identity) -> CertStatus {
        let current = self.current.as_ref();
        CertStatus {
            identity: identity.clone(),
            not_before: current.map(|c| c.not_before),
            not_after: current.map(|c| c.not_after),
            serial: current.map(|c| c.serial.clone()).unwrap_or_default(),
            error: self.error.clone(),
        }
    }
}

impl Waiting<'_> {
    /// Announces the need on the first look that finds nothing.
    fn look(&self) -> Look {
        let mut entries = self.store.entries.write();
        let Some(entry) = entries.get_mut(self.identity).filter(|e| e.waiting > 0) else {
            let text = "no local workload has this identity any more".to_owned();
            return Look::Refused(CertError::Failed(self.identity.clone(), text));
        };
        if let Some(current) = entry.usable() {
            return Look::Usable(current);
        }
        if let Some(error) = entry.unavailable() {
            return Look::Refused(CertError::Failed(self.identity.clone(), error));
        }
        if !entry.asked {
            entry.asked = true;
            self.store.send(CertEvent::Wanted {
                identity: self.identity.clone(),
                connection: true,
            });
        }
        Look::Wait(entry.changed.clone())
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut entries = self.store.entries.write();
        let Some(entry) = entries.get_mut(self.identity) else {
            return;
        };
        entry.waiting = entry.waiting.saturating_sub(1);
        if entry.waiting > 0 {
            return;
        }
        // An agent that lost the question is asked again by the next connection.
        entry.asked = false;
        if entry.retained == 0 && entry.current.is_none() && entry.pending.is_none() {
            entries.remove(self.identity);
        }
    }
}

pub(super) fn make_csr(identity: &Identity) -> Result<(String, Arc<dyn SigningKey>), String> {
    let text = |err: rcgen::Error| err.to_string();
    let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(text)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let name = Ia5String::try_from(identity.to_string()).map_err(text)?;
    params.subject_alt_names = vec![SanType::URI(name)];
    let csr = params
        .serialize_request(&pair)
        .and_then(|request| request.pem())
        .map_err(text);
    let der = Zeroizing::new(pair.serialize_der());
    pair.zeroize();
    let key = any_ecdsa_type(&PrivateKeyDer::from(PrivatePkcs8KeyDer::from(
        der.as_slice(),
    )))
    .map_err(|err| err.to_string())?;
    Ok((csr?, key))
}

fn signing_key(pkcs8: &[u8]) -> Result<Arc<dyn SigningKey>, String> {
    let signing = if pkcs8.starts_with(b"-----BEGIN") {
        let mut der = PrivatePkcs8KeyDer::from_pem_slice(pkcs8).map_err(|err| err.to_string())?;
        let borrowed = PrivatePkcs8KeyDer::from(der.secret_pkcs8_der());
        let signing = any_supported_type(&PrivateKeyDer::from(borrowed));
        der.zeroize();
        signing
    } else {
        any_supported_type(&PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pkcs8)))
    };
    signing.map_err(|err| err.to_string())
}
