"""What a node tells about its connections: metrics on 15020, log lines, spans at a collector."""

from __future__ import annotations

import asyncio
import gzip
import re
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from agent.cli.demo.clients import Conversation
from agent.cli.demo.mesh import Mesh, access_lines
from agent.cli.demo.netns import connect
from agent.cli.demo.shop import ECHO_PORT
from agent.cli.demo.story import spiffe
from proto.gen import otlp_pb2
from tests.support.meshes import mesh_of
from tests.support.otlp_collector import Collector, attributes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from prometheus_client import Metric

    from agent.cli.demo.manifests import Pod
    from agent.cli.demo.shop import Shop
    from agent.cli.demo.world import Node, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERIES_TTL = 1.0

# facts ztunnel 12.1; those of DNS and CRLs come with the first question and the first list.
STABLE = {
    "istio_tcp_connections_opened",
    "istio_tcp_connections_closed",
    "istio_tcp_received_bytes",
    "istio_tcp_sent_bytes",
    "istio_build",
    "process_open_fds",
    "process_max_fds",
}
UNSTABLE = {
    "istio_tcp_sockets_open",
    "istio_xds_message",
    "istio_xds_message_bytes",
    "workload_manager_active_proxy_count",
    "workload_manager_pending_proxy_count",
    "workload_manager_proxies_started",
    "workload_manager_proxies_stopped",
    "tokio_num_workers",
    "tokio_num_alive_tasks",
    "tokio_global_queue_depth",
    "tokio_worker_total_busy_duration_seconds",
    "tokio_worker_park_count",
    "tokio_worker_park_unpark_count",
    "underpass_log_lines_dropped",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    world: World, capture: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    """Conftest's, with an exporter, short-lived series, and a name for dashboards."""
    folder = tmp_path_factory.mktemp("mesh")
    options = (
        f"--telemetry-otlp-endpoint=http://{world.nodes[0].ipv4}:4317",
        f"--telemetry-series-ttl={SERIES_TTL:g}s",
        "--telemetry-istio-version=1.30-test",
        "--log-omit-fields=src.cluster",
    )
    async with mesh_of(Mesh, world, capture, folder, *options) as made:
        yield made


@pytest.fixture(scope="module")
def collector(world: World) -> Iterator[Collector]:
    node = world.nodes[0]
    made = Collector(node.namespace, f"{node.ipv4}:4317")
    yield made
    made.close()


async def scrape(node: Node) -> dict[str, Metric]:
    """Families by name, as Prometheus reads them."""
    reader, writer = await connect(node.namespace, "127.0.0.1", 15020)
    writer.write(
        b"GET /stats/prometheus HTTP/1.1\r\nHost: node\r\nConnection: close\r\n"
        b"Accept: application/openmetrics-text\r\nAccept-Encoding: gzip\r\n\r\n"
    )
    async with asyncio.timeout(30):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    assert b"Content-Type: application/openmetrics-text" in head, head
    if b"Transfer-Encoding: chunked" in head:
        body = _joined(body)
    text = gzip.decompress(body).decode()
    parsed = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return {family.name: family for family in parsed}


def _joined(chunked: bytes) -> bytes:
    found = b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size, 16)
        found, chunked = found + rest[:length], rest[length + 2 :] if length else b""
    return found


def total(families: dict[str, Metric], name: str, **labels: str) -> float:
    family = families.get(name)
    samples = family.samples if family is not None else []
    wanted = labels.items()
    return sum(sample.value for sample in samples if wanted <= sample.labels.items())


async def test_upstreams_metrics_exist_and_others_say_that_they_may_change(
    mesh: Mesh, shop: Shop
) -> None:
    async with Conversation(shop.web, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("ping")
        for node in mesh.world.nodes:
            families = await scrape(node)
            # None closed yet, perhaps.
            missing = (STABLE | UNSTABLE) - {"istio_tcp_connections_closed"} - families.keys()
            assert not missing
            for name, family in families.items():
                assert name in STABLE or "unstable" in family.documentation, name
            assert total(families, "istio_build", component="ztunnel", tag="1.30-test") == 1
        assert await talk.finish() == "bye\n"


async def test_live_connections_are_counted_and_series_of_gone_ones_are_dropped(
    mesh: Mesh, shop: Shop
) -> None:
    ends = dict(zip(("source", "destination"), mesh.world.nodes, strict=True))
    names = {"source_workload": "cart", "destination_workload": "db"}
    async with Conversation(shop.cart, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("ping")
        # Longer than series live that nobody uses.
        await asyncio.sleep(SERIES_TTL + 1)
        for reporter, node in ends.items():
            families = await scrape(node)

            def count(
                name: str, labels: dict[str, str], families: dict[str, Metric] = families
            ) -> float:
                return total(families, f"istio_tcp_{name}", **labels, **names)

            labels = {"reporter": reporter, "connection_security_policy": "mutual_tls"}
            assert count("connections_opened", labels) == 1
            assert count("received_bytes", labels) == len("ping\n")
            assert count("connections_closed", labels) == 0
            assert total(families, "istio_tcp_sockets_open", reporter=reporter) >= 1
        assert await talk.finish() == "bye\n"

    async def gone() -> bool:
        return all(
            [
                not total(await scrape(n), "istio_tcp_connections_opened", **names)
                for n in ends.values()
            ]
        )

    await mesh.until("series of a connection that ended are dropped", gone)


async def test_both_ends_of_a_connection_are_one_trace_at_the_collector(
    mesh: Mesh, shop: Shop, collector: Collector
) -> None:
    one, two = mesh.world.nodes
    async with Conversation(shop.batch, shop.db.sandbox.ipv4, ECHO_PORT) as talk:
        assert await talk.echo("ping")
        assert await talk.finish() == "bye\n"

    def mine(pod: Pod) -> dict[str, tuple[dict[str, object], otlp_pb2.Span]]:
        found = [
            (origin, span)
            for origin, span in collector.spans
            if attributes(span.attributes).get("src.workload") == pod.name
        ]
        return {span.name: (origin, span) for origin, span in found}

    await mesh.until("spans of both ends", lambda: len(mine(shop.batch)) == 2)
    spans = mine(shop.batch)
    (near_origin, near), (far_origin, far) = spans["outbound"], spans["inbound"]
    assert (near.kind, far.kind) == (otlp_pb2.Span.CLIENT, otlp_pb2.Span.SERVER)
    assert near.trace_id == far.trace_id
    assert (near.parent_span_id, far.parent_span_id) == (b"", near.span_id)
    assert far.span_id != near.span_id
    assert near_origin["k8s.node.name"] == one.name
    assert far_origin["k8s.node.name"] == two.name
    assert near_origin["service.name"] == "underpass"
    assert 0 < near.start_time_unix_nano < near.end_time_unix_nano
    told = attributes(far.attributes)
    assert told["src.identity"] == spiffe(shop.batch)
    assert told["dst.hbone_addr"] == f"{shop.db.sandbox.ipv4}:{ECHO_PORT}"
    assert told["bytes_recv"] == len("ping\n")
    assert told["response_flags"] == "-"
    assert "src.cluster" not in told, "what the log omits isn't exported either"

    for node in (one, two):
        lines = access_lines(mesh.log(node.name), 'src.workload="batch"', "complete")
        assert [re.search(r"id=([0-9a-f]{32})", line)[1] for line in lines] == [near.trace_id.hex()]  # type: ignore[index]
        assert "src.cluster" not in lines[0]

    def records() -> list[otlp_pb2.LogRecord]:
        return [r for _, r in collector.records if r.trace_id == near.trace_id]

    await mesh.until("log records of both ends", lambda: len(records()) == 2)
    for record in records():
        assert record.body.string_value == "connection complete"
        assert (record.severity_number, record.severity_text) == (9, "INFO")
    families = await scrape(one)
    for signal in ("logs", "traces"):
        assert total(families, "underpass_otlp_exported", signal=signal) >= 1
