"""`/metrics`: the data plane's text followed by the agent's own, as one OpenMetrics document."""

import asyncio
import logging
import os
import resource
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.openmetrics.exposition import generate_latest

from agent.admin.negotiation import Packed, compression, media_type
from agent.dataplane import DataplaneError
from agent.report import Report, version

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger("underpass.admin")

END = b"# EOF\n"
# A scraper that doesn't read is let go.
PATIENCE = 60.0


def metrics_app(report: Report) -> web.Application:
    registry = CollectorRegistry()
    registry.register(AgentMetrics(report))

    async def metrics(request: web.Request) -> web.StreamResponse:
        encoding = compression(request.headers.get("Accept-Encoding", ""))
        headers = {
            "Content-Type": media_type(request.headers.get("Accept", "")),
            "Vary": "Accept, Accept-Encoding",
        }
        if encoding != "identity":
            headers["Content-Encoding"] = encoding
        response = web.StreamResponse(headers=headers)
        packed = None
        if request.method != "HEAD":
            packed = await _gathered(report, _own(registry), encoding)
        async with asyncio.timeout(PATIENCE):
            await response.prepare(request)
            for piece in packed.pieces() if packed is not None else ():
                await response.write(piece)
            await response.write_eof()
        return response

    app = web.Application()
    # HEAD as well; another method answers 405, another path 404.
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/stats/prometheus", metrics)
    return app


async def _gathered(report: Report, own: bytes, encoding: str) -> Packed:
    """All is taken at once: a scraper that reads slowly must not hold up the agent's connection to
    the data plane. Where that one fails, its part is left out as a whole."""
    dataplane = report.dataplane
    if dataplane is not None:
        packed = Packed(encoding)
        try:
            async with asyncio.timeout(10):
                async for chunk in joined(dataplane.metrics(), own):
                    packed.add(chunk)
            return packed
        except (DataplaneError, TimeoutError) as exc:
            log.warning("no metrics of the data plane", extra={"error": exc})
    packed = Packed(encoding)
    packed.add(own)
    return packed


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


class AgentMetrics:
    """Read at each scrape, so that nothing has to be kept up to date."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> "Iterator[Metric]":
        build = InfoMetricFamily("underpass_agent", "The agent that serves this (unstable)")
        build.add_metric([], {"version": version(), "node": self._report.node})
        yield build
        yield _gauge(
            "underpass_agent_ready", "1 when nothing is pending", value=not self._report.pending()
        )
        yield from self._pods()
        yield from self._dataplane()
        yield from self._control_plane()
        yield from self._xds()
        yield from self._certificates()
        yield from _process()

    def _pods(self) -> "Iterator[Metric]":
        summary = self._report.summary()
        pods = _gauge(
            "underpass_agent_pods", "Pods of the node by how far they are", labels=["state"]
        )
        pods.add_metric(["listed"], summary.total)
        pods.add_metric(["captured"], summary.captured)
        pods.add_metric(["verified"], summary.verified)
        pods.add_metric(["failed"], summary.failed)
        yield pods
        proved = _gauge(
            "underpass_agent_pods_proved",
            "Captured pods by what the last proof by traffic found",
            labels=["state"],
        )
        proved.add_metric(["proved"], summary.proved)
        proved.add_metric(["not_proved"], summary.not_proved)
        unknown = summary.captured - summary.proved - summary.not_proved
        proved.add_metric(["unknown"], unknown)
        yield proved
        proofs = _counter(
            "underpass_agent_proofs", "Proofs of capture by what came of them", labels=["result"]
        )
        for state, count in self._report.proofs.items():
            proofs.add_metric([state.replace(" ", "_")], count)
        yield proofs
        yield _gauge(
            "workload_manager_pending_proxy_count",
            "Pods that aren't served yet",
            value=summary.total - summary.captured - summary.served,
        )
        yield _gauge(
            "underpass_precapture_connections",
            "Connections of captured pods that are older than the capture",
            value=self._report.precapture.count,
        )
        yield _counter(
            "underpass_precapture_cut",
            "Such connections that were cut",
            value=self._report.precapture.cuts,
        )
        yield _counter(
            "underpass_agent_redirection_repairs",
            "Pods whose changed rules were put back",
            value=self._report.repairs,
        )

        datagrams = _counter(
            "underpass_agent_udp",
            "UDP that the mesh doesn't carry: attempts refused, and flows that passed",
            labels=["result"],
        )
        datagrams.add_metric(["refused"], self._report.datagrams.refused)
        datagrams.add_metric(["unprotected"], self._report.datagrams.unprotected)
        yield datagrams

    def _dataplane(self) -> "Iterator[Metric]":
        view = self._report.supervised()
        yield _gauge(
            "underpass_agent_dataplane_up",
            "1 while a data plane serves",
            value=bool(view.instance_id),
        )
        yield _counter(
            "underpass_agent_dataplane_losses", "Data planes lost unasked", value=view.restarts
        )
        yield _counter(
            "underpass_agent_without_service_seconds",
            "Time in which no data plane served the pods",
            value=view.seconds_without_service,
        )

    def _control_plane(self) -> "Iterator[Metric]":
        view = self._report.control_plane()
        yield _gauge(
            "underpass_agent_xds_connected", "1 while connected to it", value=view.connected
        )
        rejected = _gauge(
            "underpass_agent_rejected_resources",
            "Resources whose newest version was rejected",
            labels=["type"],
        )
        for name, entry in view.types.items():
            rejected.add_metric([name.rpartition(".")[2]], len(entry.rejected))
        yield rejected

    def _xds(self) -> "Iterator[Metric]":
        """facts ztunnel 12.1"""
        status = self._report.xds()
        ends = _counter(
            "istio_xds_connection_terminations", "Streams that ended, by reason", labels=["reason"]
        )
        messages = _counter("istio_xds_message", "Messages received", labels=["url"])
        size = _counter("istio_xds_message_bytes", "Bytes of messages received", labels=["url"])
        for reason, count in status.terminations.items():
            ends.add_metric([reason], count)
        for url, (count, total) in status.messages.items():
            messages.add_metric([url], count)
            size.add_metric([url], total)
        for family in (ends, messages, size):
            # As upstream, which leaves out what is empty.
            if family.samples:
                yield family

    def _certificates(self) -> "Iterator[Metric]":
        """By state, not by identity: the number of series stays small on any node."""
        states = {"Available": 0, "Initializing": 0, "Unavailable": 0}
        expiries = []
        for entry in self._report.certificates():
            states[entry.state] = states.get(entry.state, 0) + 1
            if entry.not_after is not None:
                expiries.append(entry.not_after.timestamp())
        family = _gauge("underpass_agent_certificates", "Identities by state", labels=["state"])
        for state, count in states.items():
            family.add_metric([state.lower()], count)
        yield family
        if expiries:
            yield _gauge(
                "underpass_agent_next_certificate_expiry_timestamp_seconds",
                "When the first certificate expires",
                value=min(expiries),
            )
        yield from self._certificate_age()

    def _certificate_age(self) -> "Iterator[Metric]":
        now = datetime.now(UTC)
        ages = [
            (now - entry.not_before).total_seconds()
            for entry in self._report.certificates()
            if entry.not_before is not None
        ]
        yield _gauge(
            "underpass_certificate_oldest_age_seconds",
            "Age of the oldest certificate in use; half its life time when renewal works",
            value=max(ages, default=0.0),
        )
        fetched, failed = self._report.fetches()
        fetches = _counter(
            "underpass_certificate_fetches",
            "Certificates asked of the authority",
            labels=["result"],
        )
        fetches.add_metric(["ok"], fetched)
        fetches.add_metric(["failed"], failed)
        yield fetches
        trust = self._report.trust()
        if trust is None:
            return
        yield _gauge(
            "underpass_certificate_roots_retiring",
            "Roots that still count though the authority's answers leave them out",
            value=trust.retiring,
        )
        if trust.crl is not None:
            yield _gauge(
                "underpass_certificate_crl_ok",
                "1 while the configured CRL is the one in force",
                value=trust.crl_since is not None and not trust.crl_error,
            )


def _process() -> "Iterator[Metric]":
    """process_* are the data plane's."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # One of them is the folder being listed.
    opened = len(os.listdir("/proc/self/fd")) - 1
    yield _gauge("underpass_agent_open_fds", "Open file descriptors of the agent", value=opened)
    yield _gauge("underpass_agent_max_fds", "Its limit of them", value=soft)


def _gauge(
    name: str, text: str, value: float | None = None, labels: list[str] | None = None
) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, f"{text} (unstable)", value=value, labels=labels)


def _counter(
    name: str, text: str, value: float | None = None, labels: list[str] | None = None
) -> CounterMetricFamily:
    return CounterMetricFamily(name, f"{text} (unstable)", value=value, labels=labels)
