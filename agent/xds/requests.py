"""Delta discovery requests: the first of a stream, and the answer to a response."""

from collections.abc import Iterable, Mapping

from proto.gen import control_pb2, discovery_pb2

# istiod receives at most 4 MiB (facts istio-ambient 6.10); headers need a little room.
FIRST_REQUEST_LIMIT = (4 << 20) - (64 << 10)


def first(
    type_url: str,
    node: discovery_pb2.Node,
    versions: Mapping[str, str],
    *,
    on_demand: bool = False,
) -> discovery_pb2.DeltaDiscoveryRequest:
    """Wildcard subscription that tells what is held already.

    On demand, only what is held and what is local to the node (facts ztunnel 7.3).
    """
    everything = ["*"] if on_demand else []
    return discovery_pb2.DeltaDiscoveryRequest(
        node=node,
        type_url=type_url,
        initial_resource_versions=versions,
        resource_names_subscribe=everything,
        resource_names_unsubscribe=everything,
    )


def subscribe(type_url: str, names: Iterable[str]) -> discovery_pb2.DeltaDiscoveryRequest:
    """Without a nonce: istiod ignores the names in a request whose nonce isn't the newest."""
    return discovery_pb2.DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=names)


def acknowledge(reply: control_pb2.ApplyReply) -> discovery_pb2.DeltaDiscoveryRequest:
    """ACK, or NACK when the data plane rejected resources (the others were taken)."""
    answer = discovery_pb2.DeltaDiscoveryRequest(
        type_url=reply.type_url, response_nonce=reply.nonce
    )
    if reply.rejected:
        answer.error_detail.message = _reasons(reply.rejected)
    return answer


def refuse(type_url: str, nonce: str, reason: str) -> discovery_pb2.DeltaDiscoveryRequest:
    """NACK of a response of which nothing could be taken."""
    answer = discovery_pb2.DeltaDiscoveryRequest(type_url=type_url, response_nonce=nonce)
    answer.error_detail.message = reason
    return answer


def _reasons(rejected: Iterable[control_pb2.Rejection]) -> str:
    return "; ".join(f"{entry.name}: {entry.reason}" for entry in rejected)
