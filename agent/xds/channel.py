"""Opens a gRPC channel to an endpoint: TLS, keepalive, size limits."""

import grpc

from agent.xds.endpoint import Endpoint

# A whole mesh comes in one message (facts istio-ambient 6.10); the data plane refuses frames over
# 256 MiB, this limit only has to be no smaller.
RECEIVE_LIMIT = 512 << 20


def open_channel(endpoint: Endpoint, *, alt_name: bool = False) -> grpc.aio.Channel:
    """A channel of its own, not connected yet; roots are read now.

    With `alt_name` the server must prove the endpoint's alternative name instead of the host in
    the address. Raises ControlPlaneError.
    """
    target = endpoint.host_port()
    credentials = grpc.ssl_channel_credentials(root_certificates=endpoint.roots())
    milliseconds = round(endpoint.connect_timeout.total_seconds() * 1000)
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", RECEIVE_LIMIT),
        ("grpc.max_send_message_length", RECEIVE_LIMIT),
        # facts ztunnel 7.1
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Otherwise a shared connection would outlive the roots it was made with.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        # gRPC's name for how long one connection attempt may take.
        ("grpc.min_reconnect_backoff_ms", milliseconds),
        ("grpc.initial_reconnect_backoff_ms", min(1000, milliseconds)),
        # A node's control plane is in the cluster; an http_proxy variable isn't meant for it.
        ("grpc.enable_http_proxy", 0),
    ]
    if alt_name and endpoint.alt_hostname:
        options.append(("grpc.ssl_target_name_override", endpoint.alt_hostname))
    return grpc.aio.secure_channel(target, credentials, options=options)
