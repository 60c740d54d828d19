"""Configuration from a control plane or a file, handed to the data plane as it came."""

from agent.xds.backoff import Backoff
from agent.xds.client import ApplyTarget, XdsClient, XdsConfig
from agent.xds.endpoint import ControlPlaneError, Endpoint
from agent.xds.local import LocalFile
from agent.xds.node import NodeInfo
from agent.xds.status import TypeStatus, XdsStatus
from agent.xds.types import ADDRESS, AUTHORIZATION, TYPES

__all__ = [
    "ADDRESS",
    "AUTHORIZATION",
    "TYPES",
    "ApplyTarget",
    "Backoff",
    "ControlPlaneError",
    "Endpoint",
    "LocalFile",
    "NodeInfo",
    "TypeStatus",
    "XdsClient",
    "XdsConfig",
    "XdsStatus",
]
