"""Workload certificates: asked of the CA for keys that stay in the data plane, kept fresh."""

from agent.identity.ca import CaConfig, CaError
from agent.identity.manager import CertificateTarget, IdentityManager
from agent.identity.status import IdentityState, IdentityStatus

__all__ = [
    "CaConfig",
    "CaError",
    "CertificateTarget",
    "IdentityManager",
    "IdentityState",
    "IdentityStatus",
]
