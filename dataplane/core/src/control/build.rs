//! How the running process was made, as told in the dump (facts ztunnel 13.1, `version`).

use serde_json::json;

/// Known to the binary alone.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    pub revision: &'static str,
    pub rust: &'static str,
    /// debug or release.
    pub profile: &'static str,
    /// Clean or Modified: whether the tree was that of the revision.
    pub status: &'static str,
}

impl Default for Build {
    fn default() -> Self {
        let unknown = "unknown";
        Self {
            revision: unknown,
            rust: unknown,
            profile: unknown,
            status: unknown,
        }
    }
}

impl Build {
    pub(super) fn dump(&self, istio_version: &str) -> serde_json::Value {
        let istio = Some(istio_version).filter(|version| !version.is_empty());
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "gitRevision": self.revision,
            "rustVersion": self.rust,
            "buildProfile": self.profile,
            "buildStatus": self.status,
            "istioVersion": istio.unwrap_or("unknown"),
            "cryptoProvider": "aws-lc",
        })
    }
}
