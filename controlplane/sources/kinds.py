"""Which kinds are read, and by whom."""

from collections.abc import Callable, Mapping

from controlplane.sources import core, istio, policy
from controlplane.sources.fields import Field, FieldError
from controlplane.sources.meta import meta
from controlplane.sources.objects import Mode, Object, PeerAuthentication, RefusedPolicy

# By group and kind; versions of one group differ in nothing that is read here.
READERS: Mapping[tuple[str, str], Callable[[Field], Object]] = {
    ("", "Namespace"): core.namespace,
    ("", "Node"): core.node,
    ("", "Pod"): core.pod,
    ("", "Service"): core.service,
    ("discovery.k8s.io", "EndpointSlice"): core.endpoint_slice,
    ("networking.istio.io", "ServiceEntry"): istio.service_entry,
    ("networking.istio.io", "WorkloadEntry"): istio.workload_entry,
    ("security.istio.io", "PeerAuthentication"): istio.peer_authentication,
    ("security.istio.io", "AuthorizationPolicy"): policy.authorization_policy,
    ("gateway.networking.k8s.io", "Gateway"): istio.gateway,
    ("gateway.networking.k8s.io", "GatewayClass"): core.gateway_class,
}


def kind_of(document: Field) -> tuple[str, str]:
    """(group, kind). Raises FieldError when the document isn't an object at all."""
    kind = document.require("kind", "say what the document describes").filled()
    version = document.require("apiVersion", f"give the one of {kind}").filled()
    group, slash, _ = version.rpartition("/")
    return (group if slash else "", kind)


def name_of(document: Field) -> str:
    """`kind namespace/name` as far as it can be read, for messages."""
    parts = {}
    for what, path in (
        ("kind", ("kind",)),
        ("namespace", ("metadata", "namespace")),
        ("name", ("metadata", "name")),
    ):
        try:
            field = document.at(*path)
            parts[what] = field.text() if field else ""
        except FieldError:
            parts[what] = ""
    where = f"{parts['namespace']}/" if parts["namespace"] else ""
    return f"{parts['kind'] or 'object'} {where}{parts['name'] or '(no name)'}"


def substitute(document: Field) -> Object | None:
    """Stands for a policy that is refused and has no last good version (design section 6).

    It denies, or asks for mTLS, within the scope that can be read. None for other kinds and for
    policies that no node enforces.
    """
    try:
        kind = kind_of(document)[1]
        if kind not in ("AuthorizationPolicy", "PeerAuthentication"):
            return None
        about = meta(document, kind)
    except FieldError:
        return None
    try:
        selector = policy.scope_of(document)
    except FieldError:
        selector = {}
    if selector is None:
        return None
    if kind == "PeerAuthentication":
        return PeerAuthentication(about, selector, Mode.STRICT, {})
    return RefusedPolicy(about, selector)
