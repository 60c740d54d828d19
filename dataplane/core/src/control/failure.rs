//! Why a request isn't done, as the agent sees it.

use crate::inpod::ListenError;
use crate::tls::CertError;
use crate::wire::control as pb;
pub(super) use crate::wire::control::error::Code;

#[derive(Debug)]
pub(super) struct Failure {
    pub code: Code,
    /// The pod uid, resource name or identity concerned.
    pub subject: String,
    pub text: String,
}

impl Failure {
    pub fn new(code: Code, subject: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            code,
            subject: subject.into(),
            text: text.into(),
        }
    }

    pub fn invalid(subject: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(Code::Invalid, subject, text)
    }

    pub fn listen(pod: &crate::inpod::PodInfo, error: &ListenError) -> Self {
        let code = match error {
            ListenError::InUse { .. } => Code::InUse,
            ListenError::NetnsGone(_) => Code::NetnsGone,
            ListenError::NotPermitted { .. } => Code::Permission,
            ListenError::Foreign { .. } => Code::Invalid,
            ListenError::Io { .. } => Code::Internal,
        };
        Self::new(code, pod.uid.clone(), format!("{pod}: {error}"))
    }

    pub fn certificate(identity: &str, error: &CertError) -> Self {
        let code = match error {
            CertError::Invalid(..) => Code::Invalid,
            _ => Code::Internal,
        };
        Self::new(code, identity, error.to_string())
    }

    pub fn into_body(self) -> pb::reply::Body {
        pb::reply::Body::Error(pb::Error {
            code: self.code.into(),
            subject: self.subject,
            text: self.text,
        })
    }
}
