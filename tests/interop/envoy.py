"""A real Envoy in a pod that we don't capture: HBONE client on 10000, HBONE server on 15008."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import struct_pb2

from proto.gen import citadel_pb2, citadel_pb2_grpc

if TYPE_CHECKING:
    from pathlib import Path

CLIENT_PORT = 10000
TYPE = "type.googleapis.com/"
TCP_PROXY = TYPE + "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
HCM = TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = TYPE + "envoy.extensions.filters.http.router.v3.Router"
UPSTREAM_TLS = TYPE + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
DOWNSTREAM_TLS = TYPE + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


async def certificate(folder: Path, address: str, root: Path, token: str, identity: str) -> None:
    """Gets a certificate of the mesh CA for an identity into `folder`, as a node would."""
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(san, critical=True)
        .sign(key, hashes.SHA256())
    )
    metadata = struct_pb2.Struct()
    metadata["ImpersonatedIdentity"] = identity
    credentials = grpc.ssl_channel_credentials(root.read_bytes())
    async with grpc.aio.secure_channel(address, credentials) as channel:
        stub = citadel_pb2_grpc.IstioCertificateServiceStub(channel)  # type: ignore[no-untyped-call]
        answer = await stub.CreateCertificate(
            citadel_pb2.IstioCertificateRequest(
                csr=csr.public_bytes(serialization.Encoding.PEM).decode(),
                validity_duration=3600,
                metadata=metadata,
            ),
            metadata=(("authorization", f"Bearer {token}"), ("clusterid", "Kubernetes")),
            timeout=10,
        )
    (folder / "chain.pem").write_text("".join(answer.cert_chain[:-1]))
    (folder / "roots.pem").write_text(answer.cert_chain[-1])
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def configuration(folder: Path, *, own_ip: str, peer: tuple[str, int], peer_identity: str) -> str:
    """Envoy's bootstrap: what comes to 10000 goes to `peer` by HBONE, what comes to 15008 by
    HBONE goes to port 9000 on loopback."""
    host, port = peer
    common: dict[str, Any] = {
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(folder / "chain.pem")},
                "private_key": {"filename": str(folder / "key.pem")},
            }
        ],
        "tls_params": {
            # Envoy as a client offers no more than 1.2 by default.
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "alpn_protocols": ["h2"],
    }
    roots = {"trusted_ca": {"filename": str(folder / "roots.pem")}}
    expect = [{"san_type": "URI", "matcher": {"exact": peer_identity}}]
    return json.dumps(
        {
            "static_resources": {
                "listeners": [
                    _listener("client", "127.0.0.1", CLIENT_PORT, _tunnel_to(host, port)),
                    {
                        **_listener("server", own_ip, 15008, _connect_terminator()),
                        "filter_chains": [
                            {
                                "filters": [_connect_terminator()],
                                "transport_socket": {
                                    "name": "tls",
                                    "typed_config": {
                                        "@type": DOWNSTREAM_TLS,
                                        "require_client_certificate": True,
                                        "common_tls_context": {
                                            **common,
                                            "validation_context": roots,
                                        },
                                    },
                                },
                            }
                        ],
                    },
                ],
                "clusters": [
                    {
                        **_cluster("hbone", host, 15008),
                        "typed_extension_protocol_options": {
                            HTTP_OPTIONS: {
                                "@type": TYPE + HTTP_OPTIONS,
                                "explicit_http_config": {"http2_protocol_options": {}},
                            }
                        },
                        "transport_socket": {
                            "name": "tls",
                            "typed_config": {
                                "@type": UPSTREAM_TLS,
                                "common_tls_context": {
                                    **common,
                                    "validation_context": {
                                        **roots,
                                        "match_typed_subject_alt_names": expect,
                                    },
                                },
                            },
                        },
                    },
                    _cluster("app", "127.0.0.1", 9000),
                ],
            }
        }
    )


def _tunnel_to(host: str, port: int) -> dict[str, Any]:
    return {
        "name": "tcp",
        "typed_config": {
            "@type": TCP_PROXY,
            "stat_prefix": "client",
            "cluster": "hbone",
            "tunneling_config": {"hostname": f"{host}:{port}"},
        },
    }


def _connect_terminator() -> dict[str, Any]:
    route = {
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": "app",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    }
    return {
        "name": "http",
        "typed_config": {
            "@type": HCM,
            "stat_prefix": "server",
            "codec_type": "HTTP2",
            "http2_protocol_options": {"allow_connect": True},
            "upgrade_configs": [{"upgrade_type": "CONNECT"}],
            "route_config": {
                "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]
            },
            "http_filters": [{"name": "router", "typed_config": {"@type": ROUTER}}],
        },
    }


def _listener(name: str, host: str, port: int, network_filter: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "address": {"socket_address": {"address": host, "port_value": port}},
        "filter_chains": [{"filters": [network_filter]}],
    }


def _cluster(name: str, host: str, port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": host, "port_value": port}}
    endpoint = {"endpoint": {"address": address}}
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }
