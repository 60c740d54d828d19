"""How a pod's traffic is made to arrive at the data plane: the interface and its back ends."""

from redirect.base import (
    CaptureConfig,
    Datagrams,
    Installed,
    InstalledRule,
    NetnsGone,
    NotRetryable,
    Ports,
    Probe,
    Redirect,
    RedirectError,
    Target,
)
from redirect.nftables_capture import NftablesCapture

__all__ = [
    "CaptureConfig",
    "Datagrams",
    "Installed",
    "InstalledRule",
    "NetnsGone",
    "NftablesCapture",
    "NotRetryable",
    "Ports",
    "Probe",
    "Redirect",
    "RedirectError",
    "Target",
]
