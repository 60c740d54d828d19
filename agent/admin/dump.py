"""`/config_dump` in the shape of facts ztunnel 13.1, which `istioctl ztunnel-config` reads.

What the data plane holds is passed through chunk by chunk: nothing here grows with the mesh.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta

from agent import yaml_text
from agent.dataplane import Dataplane
from agent.slices import Config
from agent.values import Listen

# Keys in the order of the alphabet, as upstream prints them. Those of the data plane by its names.
_FROM_DATAPLANE = (
    "certificates",
    "policies",
    "services",
    "stagedServices",
    "version",
    "workloadState",
    "workloads",
)
OWN = ("config", "staticConfig")


async def config_dump(config: Config, dataplane: Dataplane) -> AsyncIterator[bytes]:
    """One JSON object in pieces. `dataplane` is a connection for this dump alone."""
    own = {key: await own_section(config, key) for key in OWN}
    separator = b"{"
    for key in sorted((*_FROM_DATAPLANE, *OWN)):
        yield separator + f"{json.dumps(key)}:".encode()
        separator = b",\n"
        if key in own:
            yield json.dumps(own[key]).encode()
            continue
        async for chunk in dataplane.dump(key):
            yield chunk
    yield b"}\n"


async def own_section(config: Config, name: str) -> dict[str, object]:
    """One of OWN."""
    if name == "config":
        return config_view(config)
    return await asyncio.to_thread(_static, config)


def config_view(config: Config) -> dict[str, object]:
    """Our settings under upstream's names; those of features it alone has are null. Tokens and
    what headers hold aren't dumped."""
    plane = config.source.control_plane
    authority = config.authority.endpoint if config.authority else None
    ports, wire, limits = config.capture.ports, config.wire, config.limits
    every = "[::]" if config.capture.ipv6 else "0.0.0.0"
    illegal = {ports.outbound, ports.inbound_plaintext, ports.inbound_hbone}
    workload = config.pods.workload
    return {
        "proxy": True,
        "dnsProxy": config.dns.capture,
        "dnsProxyAddr": {"Localhost": [config.capture.ipv6, ports.dns]},
        "clusterDomain": config.dns.cluster_domain,
        "preferedServiceNamespace": config.dns.preferred_namespace or None,
        "crlPath": str(config.trust.crl) if config.trust.crl else None,
        "windowSize": wire.http2.stream_window,
        "connectionWindowSize": wire.http2.connection_window,
        "frameSize": wire.http2.frame_size,
        "poolMaxStreamsPerConn": limits.pool_max_streams,
        "poolUnusedReleaseTimeout": _duration(limits.pool_idle),
        "socks5Addr": {"SocketAddr": f"127.0.0.1:{ports.socks5}"} if ports.socks5 else None,
        "adminAddr": _address(config.servers.admin),
        "statsAddr": _address(config.servers.stats),
        "readinessAddr": _address(config.servers.ready),
        "inboundAddr": f"{every}:{ports.inbound_hbone}",
        "inboundPlaintextAddr": f"{every}:{ports.inbound_plaintext}",
        "outboundAddr": f"{every}:{ports.outbound}",
        "illegalPorts": sorted(illegal | ({ports.socks5} if ports.socks5 else set())),
        "network": config.node.network,
        "localNode": config.node.name,
        "proxyMode": "Dedicated" if workload else "Shared",
        "proxyWorkloadInformation": workload
        and {
            "name": workload.name,
            "namespace": workload.namespace,
            "serviceAccount": workload.service_account,
        },
        "clusterId": config.node.cluster_id,
        "caAddress": authority and authority.address,
        "caRootCert": authority and authority.root,
        "altCaHostname": authority and authority.alt_hostname,
        "xdsAddress": plane and plane.address,
        "xdsRootCert": plane and plane.root,
        "altXdsHostname": plane and plane.alt_hostname,
        "secretTtl": _duration(config.authority.ttl) if config.authority else None,
        "xdsOnDemand": config.source.on_demand,
        "fakeCa": False,
        "fakeSelfInbound": False,
        "selfTerminationDeadline": _duration(config.dataplane.drain_deadline),
        "proxyMetadata": dict(config.source.metadata),
        "numWorkerThreads": config.dataplane.workers,
        "requireOriginalSource": {"auto": None, "must": True, "never": False}[wire.original_source],
        "proxyArgs": None,
        "dnsResolverCfg": None,
        "dnsResolverOpts": None,
        "inpodUds": str(config.pods.path) if config.pods.kind == "zds" else None,
        "inpodPortReuse": False,
        "packetMark": config.capture.mark,
        "socketConfig": {
            "keepaliveTime": _duration(wire.keepalive.time),
            "keepaliveInterval": _duration(wire.keepalive.interval),
            "keepaliveRetries": wire.keepalive.retries,
            "keepaliveEnabled": wire.keepalive.enabled,
            "userTimeoutEnabled": wire.keepalive.user_timeout,
        },
        "xdsHeaders": sorted(plane.headers) if plane else [],
        "caHeaders": sorted(authority.headers) if authority else [],
        "localhostAppTunnel": wire.localhost_app_tunnel,
        "ztunnelIdentity": None,
        "ztunnelWorkload": None,
        "ipv6Enabled": config.capture.ipv6,
        "enableEnhancedBaggage": wire.response_baggage,
    }


def _static(config: Config) -> dict[str, object]:
    """A local file as it is now, without a judgement on it."""
    found: dict[str, object] = {"workloads": [], "policies": [], "services": []}
    if config.source.file is not None:
        try:
            content = yaml_text.load(config.source.file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml_text.NotYaml):
            content = None
        if isinstance(content, Mapping):
            found |= {key: content[key] for key in found if content.get(key)}
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _duration(value: timedelta) -> dict[str, int]:
    seconds, rest = divmod(value, timedelta(seconds=1))
    return {"secs": seconds, "nanos": rest.microseconds * 1000}


def _address(listen: Listen | None) -> dict[str, object] | None:
    if listen is None:
        return None
    if listen.host == "localhost":
        return {"Localhost": [True, listen.port]}
    host = listen.host or "::"
    return {"SocketAddr": f"[{host}]:{listen.port}" if ":" in host else f"{host}:{listen.port}"}
