"""`/metrics`: the data plane's text followed by the agent's own, as one OpenMetrics document."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

from agent.dataplane import DataplaneError
from agent.report import Report, version

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger("underpass.admin")

END = b"# EOF\n"


def metrics_app(report: Report) -> web.Application:
    registry = CollectorRegistry()
    registry.register(AgentMetrics(report))

    async def metrics(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE_LATEST})
        await response.prepare(request)
        async for chunk in joined(_dataplane(report), _own(registry)):
            await response.write(chunk)
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/stats/prometheus", metrics)
    return app


async def joined(first: AsyncIterator[bytes], last: bytes) -> AsyncIterator[bytes]:
    """One end mark, the last one's, wherever chunks split the first one's."""
    kept = b""
    async for chunk in first:
        whole = kept + chunk
        cut = max(0, len(whole) - len(END))
        if cut:
            yield whole[:cut]
        kept = whole[cut:]
    if kept != END:
        yield kept if not kept or kept.endswith(b"\n") else kept + b"\n"
    yield last


def _own(registry: CollectorRegistry) -> bytes:
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return text


async def _dataplane(report: Report) -> AsyncIterator[bytes]:
    """Nothing while there is none. All is taken at once: a scraper that reads slowly must not
    hold up the agent's connection."""
    dataplane = report.dataplane
    if dataplane is None:
        return
    try:
        async with asyncio.timeout(10):
            chunks = [chunk async for chunk in dataplane.metrics()]
    except (DataplaneError, TimeoutError) as exc:
        log.warning("no metrics of the data plane", extra={"error": exc})
        return
    for chunk in chunks:
        yield chunk


class AgentMetrics:
    """Read at each scrape, so that nothing has to be kept up to date."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> "Iterator[Metric]":
        build = InfoMetricFamily("underpass_agent", "The agent that serves this")
        build.add_metric([], {"version": version(), "node": self._report.node})
        yield build
        yield GaugeMetricFamily(
            "underpass_agent_ready", "1 when nothing is pending", value=not self._report.pending()
        )
        yield from self._pods()
        yield from self._dataplane()
        yield from self._control_plane()
        yield from self._certificates()

    def _pods(self) -> "Iterator[Metric]":
        summary = self._report.summary()
        pods = GaugeMetricFamily(
            "underpass_agent_pods", "Pods of the node by how far they are", labels=["state"]
        )
        pods.add_metric(["listed"], summary.total)
        pods.add_metric(["captured"], summary.captured)
        pods.add_metric(["verified"], summary.verified)
        pods.add_metric(["failed"], summary.failed)
        yield pods
        yield CounterMetricFamily(
            "underpass_agent_redirection_repairs",
            "Pods whose changed rules were put back",
            value=self._report.repairs,
        )

    def _dataplane(self) -> "Iterator[Metric]":
        view = self._report.supervised()
        yield GaugeMetricFamily(
            "underpass_agent_dataplane_up",
            "1 while a data plane serves",
            value=bool(view.instance_id),
        )
        yield CounterMetricFamily(
            "underpass_agent_dataplane_losses", "Data planes lost unasked", value=view.restarts
        )
        yield CounterMetricFamily(
            "underpass_agent_without_service_seconds",
            "Time in which no data plane served the pods",
            value=view.seconds_without_service,
        )

    def _control_plane(self) -> "Iterator[Metric]":
        view = self._report.control_plane()
        yield GaugeMetricFamily(
            "underpass_agent_xds_connected", "1 while connected to it", value=view.connected
        )
        rejected = GaugeMetricFamily(
            "underpass_agent_rejected_resources",
            "Resources whose newest version was rejected",
            labels=["type"],
        )
        for name, entry in view.types.items():
            rejected.add_metric([name.rpartition(".")[2]], len(entry.rejected))
        yield rejected

    def _certificates(self) -> "Iterator[Metric]":
        """By state, not by identity: the number of series stays small on any node."""
        states = {"Available": 0, "Initializing": 0, "Unavailable": 0}
        expiries = []
        for entry in self._report.certificates():
            states[entry.state] = states.get(entry.state, 0) + 1
            if entry.not_after is not None:
                expiries.append(entry.not_after.timestamp())
        family = GaugeMetricFamily(
            "underpass_agent_certificates", "Identities by state", labels=["state"]
        )
        for state, count in states.items():
            family.add_metric([state.lower()], count)
        yield family
        if expiries:
            yield GaugeMetricFamily(
                "underpass_agent_next_certificate_expiry_timestamp_seconds",
                "When the first certificate expires",
                value=min(expiries),
            )
