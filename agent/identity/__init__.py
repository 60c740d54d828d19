"""Workload certificates, kept fresh: asked of the CA for keys that stay in the data plane, or taken
from a SPIRE agent together with their keys."""

from agent.identity.ca import CaConfig, CaError
from agent.identity.manager import CertificateTarget, IdentityManager
from agent.identity.status import IdentityState, IdentityStatus
from agent.identity.supply import Supply, SupplyTrouble

__all__ = [
    "CaConfig",
    "CaError",
    "CertificateTarget",
    "IdentityManager",
    "IdentityState",
    "IdentityStatus",
    "Supply",
    "SupplyTrouble",
]
