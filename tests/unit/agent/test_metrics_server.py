"""15020: what a scraper asks for is what it gets, from both processes (facts ztunnel 13)."""

import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from agent.admin.negotiation import OPENMETRICS, PLAIN, compression, media_type
from agent.xds.progress import Progress
from agent.xds.types import TYPES
from tests.unit.agent.test_admin import Node


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    async with made.servers:
        yield made
    await made.reconciler.close()
    await made.feed.close()
    await made.supervisor.close()


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;q=0.6,application/openmetrics-text;"
    "version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3"
)


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", PLAIN),
        ("*/*", PLAIN),
        ("text/plain", PLAIN),
        ("application/openmetrics-text", OPENMETRICS),
        ("Application/OpenMetrics-Text; version=1.0.0", OPENMETRICS),
        ("application/openmetrics-text;q=0, text/plain", PLAIN),
        ("application/openmetrics-text;q=nonsense", PLAIN),
        (PROMETHEUS, OPENMETRICS),
    ],
)
def test_media_type_is_openmetrics_only_where_asked_for(accept: str, wanted: str) -> None:
    assert media_type(accept) == wanted


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", "identity"),
        ("identity", "identity"),
        ("gzip", "gzip"),
        ("GZip;q=0.5", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("br, zstd", "identity"),
        ("*", "gzip"),
        ("*;q=0", "identity"),
        ("gzip;q=0, *", "deflate"),
        ("gzip;q=0.1, identity", "identity"),
        (";;,,=;q=,gzip", "gzip"),
    ],
)
def test_compression_is_the_best_that_both_know(accept: str, wanted: str) -> None:
    assert compression(accept) == wanted


@pytest.mark.parametrize("path", ["/metrics", "/stats/prometheus"])
@pytest.mark.parametrize(("encoding", "window"), [("gzip", 31), ("deflate", 15), ("identity", 0)])
async def test_body_is_openmetrics_in_the_encoding_asked_for(
    node: Node, path: str, encoding: str, window: int
) -> None:
    url = f"http://{node.servers.bound['stats']}{path}"
    headers = {"Accept-Encoding": encoding, "Accept": PROMETHEUS}
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.get(url, headers=headers) as answer,
    ):
        body = await answer.read()
        assert answer.status == 200
        assert answer.headers["Content-Type"] == OPENMETRICS
        assert answer.headers.get("Content-Encoding", "identity") == encoding
    text = (zlib.decompress(body, wbits=window) if window else body).decode()
    assert text.endswith("# EOF\n")
    parsed = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    families = {family.name: family for family in parsed}
    assert families["workload_manager_pending_proxy_count"].samples[0].value == 0
    assert families["underpass_agent_open_fds"].samples[0].value > 3
    for family in families.values():
        assert "unstable" in family.documentation, family.name


async def test_head_tells_the_headers_alone(node: Node) -> None:
    url = f"http://{node.servers.bound['stats']}/metrics"
    headers = {"Accept-Encoding": "gzip"}
    async with aiohttp.ClientSession() as session, session.head(url, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == PLAIN
        assert answer.headers["Content-Encoding"] == "gzip"
        assert await answer.read() == b""


async def test_other_paths_and_methods_are_refused(node: Node) -> None:
    assert (await node.get("stats", "/metric"))[0] == 404
    assert (await node.get("stats", "/metrics/"))[0] == 404
    assert (await node.get("stats", "/metrics", "POST"))[0] == 405


async def test_streams_and_messages_of_the_control_plane_are_counted(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress("https://cp")
    progress.terminated("ConnectionError")
    progress.terminated("Complete")
    progress.terminated("Complete")
    progress.received(TYPES[0], 100)
    progress.received(TYPES[0], 11)
    for number in range(100):
        progress.received(f"made.up/{number}", 1)
    monkeypatch.setattr(node.report, "xds", progress.snapshot)
    _, text = await node.get("stats", "/metrics")
    for line in (
        'istio_xds_connection_terminations_total{reason="ConnectionError"} 1.0',
        'istio_xds_connection_terminations_total{reason="Complete"} 2.0',
        f'istio_xds_message_total{{url="{TYPES[0]}"}} 2.0',
        f'istio_xds_message_bytes_total{{url="{TYPES[0]}"}} 111.0',
        'istio_xds_message_total{url="other"} 100.0',
    ):
        assert f"{line}\n" in text
    assert text.count("istio_xds_message_total{") == 2
