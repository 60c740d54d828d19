"""The two resource types a node subscribes to (facts ztunnel 7.3)."""

from typing import Final

ADDRESS: Final = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION: Final = "type.googleapis.com/istio.security.Authorization"
# Subscribed in this order, so that workloads are usually known before the policies they list.
TYPES: Final = (ADDRESS, AUTHORIZATION)
