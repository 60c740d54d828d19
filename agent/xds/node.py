"""Who this node says it is towards a control plane (facts ztunnel 7.2)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proto.gen import discovery_pb2


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """Name and metadata of the node; `metadata` wins over what is derived here."""

    node_name: str
    pod_name: str = "underpass"
    pod_namespace: str = "istio-system"
    service_account: str = ""
    instance_ip: str = "1.1.1.1"
    network: str = ""
    # ISTIO_META_* without the prefix; values of ISTIO_METAJSON_* as parsed.
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def id(self) -> str:
        # The type must be "ztunnel": control planes choose by it what a client may ask.
        pod, namespace = self.pod_name, self.pod_namespace
        return f"ztunnel~{self.instance_ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"

    def message(self, cluster_id: str) -> discovery_pb2.Node:
        """The node message of a stream's first requests."""
        node = discovery_pb2.Node(id=self.id())
        fields: dict[str, Any] = {
            "NAME": self.pod_name,
            "NAMESPACE": self.pod_namespace,
            "INSTANCE_IPS": self.instance_ip,
            "NODE_NAME": self.node_name,
            "CLUSTER_ID": cluster_id,
        }
        # Checked against the caller's token when present (facts istio-ambient 7).
        if self.service_account:
            fields["SERVICE_ACCOUNT"] = self.service_account
        if self.network:
            fields["NETWORK"] = self.network
        node.metadata.update(fields | dict(self.metadata))
        return node
