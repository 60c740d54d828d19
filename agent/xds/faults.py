"""Turns gRPC failures into sentences that name the address, the cause and the remedy."""

import re

import grpc

from agent.xds.endpoint import Endpoint

_TLS_REASON = re.compile(r"OPENSSL_internal:([A-Z0-9_]+)(?:: ([^:,;\n\]]+))?")


def describe(error: grpc.aio.AioRpcError, endpoint: Endpoint, *, node: str, what: str) -> str:
    """One sentence for an operator; `what` is the service asked, `node` who asked."""
    where = f"{what} at {endpoint.address}"
    details = error.details() or ""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return _unavailable(details, where, endpoint)
        case grpc.StatusCode.UNAUTHENTICATED:
            return f"{where}: UNAUTHENTICATED: {details}; {_token_hint(endpoint, node)}"
        case grpc.StatusCode.PERMISSION_DENIED:
            # A good token doesn't help against another mesh's name.
            other_mesh = "trust domain" in details
            hint = "compare --trust-domain" if other_mesh else _token_hint(endpoint, node)
            return f"{where}: PERMISSION_DENIED: {details}; node {node} may not ask this: {hint}"
        case grpc.StatusCode.UNIMPLEMENTED:
            return (
                f"{where}: UNIMPLEMENTED: {details}; this address doesn't offer {what}: "
                "is it the TLS port (15012) of a control plane with ambient mode switched on?"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{where}: no answer in time; is the control plane overloaded?"
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return f"{where}: RESOURCE_EXHAUSTED: {details}; a message is over a size limit"
        case code:
            return f"{where}: {code.name}: {details}"


def is_name_mismatch(error: grpc.aio.AioRpcError) -> bool:
    """The server's certificate is good but carries another name."""
    return _other_name(error.details() or "")


def is_too_large(error: grpc.aio.AioRpcError) -> bool:
    """The server refused a request for its size."""
    return error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (
        error.details() or ""
    )


def _other_name(details: str) -> bool:
    # The second wording is that of older gRPC releases.
    return "Hostname Verification Check failed" in details or (
        "is not in peer certificate" in details
    )


def _unavailable(details: str, where: str, endpoint: Endpoint) -> str:
    if _other_name(details):
        return (
            f"{where}: TLS failed: the server's certificate is for another name; use the name it "
            "was issued for or set the alternative hostname"
        )
    if "CERTIFICATE_VERIFY_FAILED" in details or "andshake" in details:
        found = _TLS_REASON.search(details)
        reason = ": ".join(part for part in found.groups() if part) if found else details
        return (
            f"{where}: TLS failed: {reason}; the server's certificate must be valid now and chain "
            f"to {_roots_name(endpoint)}"
        )
    if "DNS" in details or "resolution" in details:
        return f"{where}: the name can't be resolved: {details}"
    if "onnection refused" in details:
        return f"{where}: connection refused; is the control plane running and the port right?"
    if "imeout" in details or "imed out" in details or "eadline" in details:
        return f"{where}: no connection in time; is the address reachable from this node?"
    return f"{where}: unavailable: {details}"


def _roots_name(endpoint: Endpoint) -> str:
    if "-----BEGIN" in endpoint.root_cert:
        return "the configured root certificate"
    return f"the roots in {endpoint.root_cert}"


def _token_hint(endpoint: Endpoint, node: str) -> str:
    if endpoint.token_path is None:
        return f"no token file is set for node {node}"
    return (
        f"the token in {endpoint.token_path} must be unexpired and made for node {node} "
        f"(cluster {endpoint.cluster_id})"
    )
