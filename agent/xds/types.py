"""The two resource types a node subscribes to (facts ztunnel 7.3)."""

from typing import Final

ADDRESS: Final = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION: Final = "type.googleapis.com/istio.security.Authorization"
# Subscribed in this order: a workload that lists a policy which hasn't arrived is closed to
# everybody, so policies come first.
TYPES: Final = (AUTHORIZATION, ADDRESS)
