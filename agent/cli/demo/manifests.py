"""Kubernetes and Istio manifests of a world, written as files that the control plane watches."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agent.cli.demo.world import PodSandbox

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod of the demo's or a test's mesh: its sandbox and what Kubernetes would say of it."""

    sandbox: PodSandbox
    namespace: str
    service_account: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ambient: bool = True
    probe_ports: Sequence[int] = ()

    @property
    def name(self) -> str:
        return self.sandbox.name

    @property
    def uid(self) -> str:
        return f"uid-{self.namespace}-{self.name}"

    def entry(self) -> Manifest:
        """The entry of a pod file."""
        entry: Manifest = {
            "name": self.name,
            "namespace": self.namespace,
            "serviceAccount": self.service_account,
            "uid": self.uid,
            "netns": str(self.sandbox.path),
        }
        if self.probe_ports:
            entry["probePorts"] = list(self.probe_ports)
        return entry

    def manifest(self, *, ready: bool = True) -> Manifest:
        labels = {"app": self.name, **self.labels}
        if not self.ambient:
            labels["istio.io/dataplane-mode"] = "none"
        status = "True" if ready else "False"
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "uid": self.uid,
                "labels": labels,
            },
            "spec": {
                "nodeName": self.sandbox.node.name,
                "serviceAccountName": self.service_account,
                "containers": [{"name": "app", "image": "app"}],
            },
            "status": {
                "phase": "Running",
                "podIP": self.sandbox.ipv4,
                "podIPs": [{"ip": self.sandbox.ipv4}, {"ip": self.sandbox.ipv6}],
                "conditions": [{"type": "Ready", "status": status}],
            },
        }


def namespace(name: str, *, ambient: bool = True, **labels: str) -> Manifest:
    if ambient:
        labels["istio.io/dataplane-mode"] = "ambient"
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": labels},
    }


def service(
    name: str, in_namespace: str, port: int, target: int, selector: Mapping[str, str]
) -> Manifest:
    """Without a clusterIP: the control plane gives it a stable one."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": in_namespace},
        "spec": {
            "selector": dict(selector),
            "ports": [{"name": "main", "port": port, "targetPort": target, "protocol": "TCP"}],
        },
    }


def deny(
    name: str, in_namespace: str, *, app: str, principals: Sequence[str], dry_run: bool = False
) -> Manifest:
    metadata: Manifest = {"name": name, "namespace": in_namespace}
    if dry_run:
        metadata["annotations"] = {"istio.io/dry-run": "true"}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": metadata,
        "spec": {
            "selector": {"matchLabels": {"app": app}},
            "action": "DENY",
            "rules": [{"from": [{"source": {"principals": list(principals)}}]}],
        },
    }


def strict(in_namespace: str) -> Manifest:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": in_namespace},
        "spec": {"mtls": {"mode": "STRICT"}},
    }


def write(file: Path, content: Manifest | Sequence[Manifest]) -> None:
    """Replaces the file in one step, so that a watcher never reads half of it."""
    documents = [content] if isinstance(content, dict) else list(content)
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    os.replace(temporary, file)


def write_list(file: Path, entries: Sequence[Manifest]) -> None:
    """The same for a file that holds one YAML list, such as a pod file."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(yaml.safe_dump(list(entries), sort_keys=False))
    os.replace(temporary, file)
