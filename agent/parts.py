"""From slices of the configuration to the parts that they configure."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from agent import ebpf_probe
from agent.capture import PresentCapture
from agent.errors import CaptureUnusable
from agent.feed import ConfigurationSource
from agent.identity.ca import CaConfig
from agent.identity.manager import IdentityManager
from agent.identity.supply import ROTATION_SPREAD, Supply
from agent.identity.trust import TrustConfig, TrustKeeper
from agent.pods.dns import DnsRules
from agent.pods.file import FileSource
from agent.pods.precapture import Precapture
from agent.pods.precapture_note import Note
from agent.pods.proofs import Means
from agent.pods.prove_child import ProveChild
from agent.pods.source import PodSource
from agent.secret import overwrite_freed_memory
from agent.slices import Authority, Config
from agent.status import CaptureView
from proto.gen import control_pb2
from redirect.base import CaptureConfig, Ports, Redirect

log = logging.getLogger("underpass.agent")

LEAF_TO_COME = Path("/dataplane")
_ORIGINAL_SOURCE = {
    "auto": control_pb2.ORIGINAL_SOURCE_AUTO,
    "must": control_pb2.ORIGINAL_SOURCE_MUST,
    "never": control_pb2.ORIGINAL_SOURCE_NEVER,
}


async def redirect(config: Config, present: PresentCapture) -> tuple[Redirect | None, CaptureView]:
    """Raises CaptureUnusable with the reason and what to do."""
    if config.capture.mode == "none":
        return None, CaptureView("none", "switched off by --capture none")
    if config.capture.mode == "external":
        who = "the ZDS server" if config.pods.kind == "zds" else "somebody else"
        return None, CaptureView("external", f"{who} redirects traffic to the data plane")
    mode, why_not = config.capture.mode, config.capture.no_ebpf
    if mode == "ebpf" or (mode == "auto" and not why_not):
        from redirect.ebpf import EbpfCapture

        ebpf = EbpfCapture(present, capture_config(config))
        probe = await ebpf.probe()
        if probe.usable:
            chosen = "asked for" if mode == "ebpf" else "the node has all that it needs"
            return ebpf, CaptureView("ebpf", chosen, probe.notes)
        await ebpf.close()
        if mode == "ebpf":
            raise CaptureUnusable(f"ebpf: {probe.reason}")
        why_not = probe.reason
    from redirect.nftables_capture import NftablesCapture

    plain = capture_config(config)
    # Which leaf the data plane lives in is known when it answers; a lack of one is told then.
    capture = NftablesCapture(replace(plain, exempt_cgroups=(LEAF_TO_COME,)))
    probe = await capture.probe()
    capture.reconfigure(plain)
    if not probe.usable:
        await capture.close()
        raise CaptureUnusable(f"nftables: {probe.reason}")
    chosen = "asked for" if mode == "nftables" else f"not by eBPF: {why_not}"
    return capture, CaptureView("nftables", chosen, probe.notes)


def capture_client(config: Config) -> PresentCapture:
    return PresentCapture(partial(ebpf_probe.probe, config.capture.ebpf, config.dataplane))


async def beside(
    config: Config, chosen: Redirect | None, present: PresentCapture
) -> tuple[tuple[Redirect, ...], Mapping[str, str]]:
    """Ways that single pods may ask for, or come from, and why others can't be had."""
    if chosen is None:
        return (), {}
    if chosen.name == "ebpf":
        from redirect.nftables_capture import NftablesCapture

        way: Redirect = NftablesCapture(capture_config(config))
    elif config.capture.ebpf is None:
        return (), {"ebpf": config.capture.no_ebpf}
    else:
        from redirect.ebpf import EbpfCapture

        way = EbpfCapture(present, capture_config(config))
    probe = await way.probe()
    if probe.usable:
        return (way,), {}
    await way.close()
    return (), {way.name: probe.reason}


def capture_config(config: Config) -> CaptureConfig:
    ports = config.capture.ports
    return CaptureConfig(
        ports=Ports(
            ports.outbound,
            ports.inbound_plaintext,
            ports.inbound_hbone,
            ports.dns if config.dns.capture else None,
        ),
        mark=config.capture.mark,
        ipv6=config.capture.ipv6,
    )


def precapture(config: Config) -> Precapture:
    return Precapture(
        capture_config(config),
        Note(config.paths.precapture_note),
        cut_all=config.capture.cut_precapture,
        namespaces=config.namespaces,
    )


def proofs(config: Config) -> Means | None:
    """Only capture by us is ours to prove."""
    capture = config.capture
    if capture.mode in ("none", "external") or capture.prove_interval is None:
        return None
    binary = config.dataplane.prover
    leaf = None
    if capture.ebpf is not None:
        # Hooks run by cgroup, and the child's connections are to be like those of a pod.
        leaf = capture.ebpf.pods_cgroup / f"underpass-prove-{config.node.name}"
    return Means(
        maker=None if binary is None else ProveChild(binary, leaf),
        interval=capture.prove_interval,
        ipv6=capture.ipv6,
        why="no underpass-dataplane here makes the connections; name one (dataplane.bin)",
    )


def pod_ports(config: Config) -> frozenset[int]:
    """TCP listeners of the data plane in each pod."""
    ports = config.capture.ports
    found = {ports.outbound, ports.inbound_plaintext, ports.inbound_hbone, ports.dns}
    return frozenset(found | ({ports.socks5} if ports.socks5 else set()))


def dns_rules(config: Config) -> DnsRules:
    return DnsRules(config.dns.capture, config.dns.nameservers)


def pod_source(config: Config) -> PodSource:
    named = _named_pods(config)
    own, stats = config.servers.hbone, config.servers.stats
    if own is None or stats is None:
        return named
    from agent.pods.own import WithOwn

    return WithOwn(named, own, (stats.port,))


def _named_pods(config: Config) -> PodSource:
    chosen = config.pods
    match chosen.kind:
        case "zds":
            from agent.pods.zds import ZdsSource

            return ZdsSource(chosen.path)
        case "self":
            from agent.pods.own import OwnSource

            assert chosen.workload is not None  # settings: self names one
            return OwnSource(chosen.workload)
        case _:
            return FileSource(chosen.path)


def configuration_source(config: Config) -> ConfigurationSource:
    if config.source.file is not None:
        from agent.xds.local import LocalFile

        return LocalFile(config.source.file)
    from agent.xds.client import XdsClient, XdsConfig
    from agent.xds.node import NodeInfo

    endpoint = config.source.control_plane
    assert endpoint is not None  # config: a file or a control plane
    own = config.node
    node = NodeInfo(
        node_name=own.name,
        pod_name=own.pod_name,
        pod_namespace=own.pod_namespace,
        service_account=own.service_account,
        instance_ip=own.address,
        network=own.network,
        metadata=config.source.metadata,
    )
    return XdsClient(
        XdsConfig(
            address=endpoint.address,
            root_cert=endpoint.root,
            alt_hostname=endpoint.alt_hostname,
            token_path=endpoint.token,
            cluster_id=config.node.cluster_id,
            headers=endpoint.headers,
            node=node,
            on_demand=config.source.on_demand,
        )
    )


def trust_keeper(config: Config) -> TrustKeeper:
    return TrustKeeper(
        TrustConfig(
            crl=config.trust.crl,
            aliases=config.trust.aliases,
            compliance_policy="" if config.trust.compliance_policy == "none" else "pqc",
            overlap=config.trust.overlap,
            folder=config.paths.root,
        )
    )


def identities(config: Config, trust: TrustKeeper | None = None) -> Supply | None:
    # Well within the overlap, with time for a second attempt.
    spread = min(ROTATION_SPREAD, config.trust.overlap.total_seconds() / 4)
    if config.spire is not None:
        from agent.identity.spire import SpireIdentities
        from agent.identity.spire_config import SpireConfig

        if not overwrite_freed_memory():
            log.warning("this C library leaves freed memory as it is: parts of keys may stay in it")
        # It signs for its own trust domain alone: aliases are no identities of pods here.
        spire = SpireConfig(socket=config.spire.socket)
        return SpireIdentities(spire, config.node.trust_domain, roots=trust, spread=spread)
    if config.authority is not None:
        return _identity_manager(config, config.authority, trust, spread)
    return None


def _identity_manager(
    config: Config, authority: Authority, trust: TrustKeeper | None, spread: float
) -> IdentityManager:
    endpoint = authority.endpoint
    return IdentityManager(
        CaConfig(
            address=endpoint.address,
            root_cert=endpoint.root,
            alt_hostname=endpoint.alt_hostname,
            token_path=endpoint.token,
            cluster_id=config.node.cluster_id,
            headers=endpoint.headers,
            node_name=config.node.name,
            ttl=authority.ttl,
            # facts ztunnel 1.5: a dedicated proxy asks for its own identity alone.
            impersonate=config.pods.kind != "self",
        ),
        config.node.trust_domain,
        roots=trust,
        spread=spread,
        aliases=config.trust.aliases,
    )


def instance_config(config: Config) -> control_pb2.InstanceConfig:
    ports, limits, wire = config.capture.ports, config.limits, config.wire
    ebpf = config.capture.ebpf
    return control_pb2.InstanceConfig(
        ebpf=None
        if ebpf is None
        else control_pb2.Ebpf(
            pods_cgroup=str(ebpf.pods_cgroup),
            kubelet_cgroup=str(config.capture.kubelet_cgroup or ""),
            folder=str(ebpf.folder),
            pod_max_pending=ebpf.pod_max_pending,
        ),
        node=config.node.name,
        network=config.node.network,
        cluster_id=config.node.cluster_id,
        trust_domain=config.node.trust_domain,
        outbound_port=ports.outbound,
        inbound_plaintext_port=ports.inbound_plaintext,
        inbound_hbone_port=ports.inbound_hbone,
        mark=config.capture.mark,
        ipv6_disabled=not config.capture.ipv6,
        socks5_port=ports.socks5 or 0,
        dns_port=ports.dns,
        dns=control_pb2.Dns(
            cluster_domain=config.dns.cluster_domain,
            nameservers=config.dns.nameservers,
            preferred_namespace=config.dns.preferred_namespace,
            forward_timeout_ms=_ms(config.dns.forward_timeout),
            cache_entries=config.dns.cache_entries,
            pod_max_pending=config.dns.pod_max_pending,
        ),
        kubelet_probe_fallback=config.capture.kubelet_probe_fallback,
        on_demand=config.source.on_demand,
        original_source=_ORIGINAL_SOURCE[wire.original_source],
        localhost_app_tunnel_off=not wire.localhost_app_tunnel,
        response_baggage_off=not wire.response_baggage,
        http2=control_pb2.Http2(
            stream_window=wire.http2.stream_window,
            connection_window=wire.http2.connection_window,
            frame_size=wire.http2.frame_size,
        ),
        keepalive=control_pb2.Keepalive(
            off=not wire.keepalive.enabled,
            time_s=round(wire.keepalive.time.total_seconds()),
            interval_s=round(wire.keepalive.interval.total_seconds()),
            retries=wire.keepalive.retries,
            user_timeout=wire.keepalive.user_timeout,
        ),
        log=control_pb2.LogConfig(
            format=(
                control_pb2.LogConfig.JSON
                if config.log.format == "json"
                else control_pb2.LogConfig.TEXT
            ),
            filter=config.log.filter,
            access_log_off=not config.log.access,
            sample_one_in=config.log.sample,
            omit_fields=config.log.omit_fields,
            queue_lines=config.log.queue,
            policy_decisions=config.log.policy_decisions,
        ),
        telemetry=control_pb2.Telemetry(
            otlp_endpoint=config.telemetry.otlp_endpoint or "",
            series_ttl_ms=_ms(config.telemetry.series_ttl),
            istio_version=config.telemetry.istio_version,
        ),
        limits=control_pb2.Limits(
            connect_timeout_ms=_ms(limits.connect_timeout),
            tls_handshake_timeout_ms=_ms(limits.tls_handshake_timeout),
            connect_answer_timeout_ms=_ms(limits.connect_answer_timeout),
            workload_wait_ms=_ms(limits.workload_wait),
            preface_timeout_ms=_ms(limits.preface_timeout),
            pool_max_streams=limits.pool_max_streams,
            pool_idle_ms=_ms(limits.pool_idle),
            pool_max_tunnels=limits.pool_max_tunnels,
            pod_max_connections=limits.pod_max_connections,
            pod_max_handshakes=limits.pod_max_handshakes,
            drain_deadline_ms=_ms(config.dataplane.drain_deadline),
        ),
    )


def _ms(value: timedelta) -> int:
    """Zero would mean the default."""
    return max(1, round(value.total_seconds() * 1000))
