"""What the data plane is told of a pod's DNS."""

import logging
from dataclasses import dataclass

from agent.pods import resolv_conf
from agent.pods.resolv_conf import ResolvConf, Unreadable
from agent.pods.source import Pod
from proto.gen import control_pb2

log = logging.getLogger("underpass.pods")


@dataclass(frozen=True)
class DnsRules:
    """What holds for the DNS of every pod of the node."""

    # Off: no pod's DNS is caught, whatever it asks for.
    capture: bool = True
    # `ip` or `ip:port`; of pods whose own aren't known. Empty: the agent's own.
    nameservers: tuple[str, ...] = ()

    def apply(self, pod: Pod, settings: control_pb2.PodSettings) -> None:
        settings.dns = self.capture and pod.dns_capture
        if not settings.dns:
            return
        own = _own(pod)
        servers = own.nameservers or self.nameservers or resolv_conf.of_node().nameservers
        settings.resolv_conf.nameservers.extend(servers)
        settings.resolv_conf.search.extend(own.search)
        settings.resolv_conf.ndots = own.ndots
        if not servers:
            log.warning("no nameserver is known for a pod", extra={"pod": pod.key})


def _own(pod: Pod) -> ResolvConf:
    if pod.resolv_conf is None:
        return ResolvConf()
    try:
        return resolv_conf.read(pod.resolv_conf)
    except Unreadable as exc:
        log.debug("pod's resolv.conf isn't used", extra={"pod": pod.key, "why": exc})
        return ResolvConf()
