"""`run()`: builds the agent's parts in order, ties them together, and ends them as signals say."""

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from dataclasses import replace

from agent import logs, parts
from agent.admin.servers import Servers
from agent.claim import claimed
from agent.errors import AgentError
from agent.feed import ConfigurationSource, Feed
from agent.identity.supply import Supply
from agent.identity.trust import TrustKeeper
from agent.levels import Levels
from agent.pods.ledger import Ledger
from agent.pods.reconciler import Reconciler
from agent.pods.source import PodSource
from agent.report import Report
from agent.slices import Config
from agent.supervisor import Supervisor
from redirect.base import Redirect

log = logging.getLogger("underpass.agent")

EXIT_OK = 0
EXIT_FAILED = 1


def run(config: Config) -> int:
    """Until a signal ends it. The exit code is 0 after a wanted end."""
    logs.setup(config.log)
    for warning in config.warnings:
        log.warning(warning)
    try:
        with claimed(config.paths):
            return asyncio.run(_serve(config))
    except AgentError as exc:
        log.error("agent can't run", extra={"error": exc, "remedy": exc.remedy})
        return EXIT_FAILED


async def _serve(config: Config) -> int:
    present = parts.capture_client(config)
    redirect, capture = await parts.redirect(config, present)
    if config.capture.ebpf is not None:
        capture = replace(capture, pins=str(config.capture.ebpf.folder))
    log.info("capture chosen", extra={"mode": capture.mode, "why": capture.reason})
    others, missing = await parts.beside(config, redirect, present)
    pods = parts.pod_source(config)
    source = parts.configuration_source(config)
    trust = parts.trust_keeper(config)
    identities = parts.identities(config, trust)
    reconciler = Reconciler(
        redirect,
        verify_interval=config.capture.verify_interval,
        drain_deadline=config.dataplane.drain_deadline,
        ledger=Ledger(config.paths.captured_pods),
        namespaces=config.namespaces,
        external=config.capture.mode == "external",
        ports=parts.pod_ports(config),
        dns=parts.dns_rules(config),
        precapture=parts.precapture(config),
        proofs=parts.proofs(config),
        others=others,
        missing=missing,
    )
    feed = Feed(source, identities, reconciler, parts.capture_config(config), trust)
    present.follow(lambda: feed.present)
    supervisor = Supervisor(config.dataplane, config.paths, parts.instance_config(config), feed)
    report = Report(
        config.node.name, capture, pods, source, identities, reconciler, feed, supervisor, trust
    )
    app = App(pods, source, identities, trust, reconciler, feed, supervisor, redirect, *others)
    levels = Levels(config.log, supervisor)
    async with Servers(config, report, levels, supervisor.replace, app.end):
        return await app.run()


class App:
    """The running parts and how they end."""

    def __init__(
        self,
        pods: PodSource,
        source: ConfigurationSource,
        identities: Supply | None,
        trust: TrustKeeper,
        reconciler: Reconciler,
        feed: Feed,
        supervisor: Supervisor,
        *redirects: Redirect | None,
    ) -> None:
        self._pods = pods
        self._source = source
        self._identities = identities
        self._trust = trust
        self._reconciler = reconciler
        self._feed = feed
        self._supervisor = supervisor
        self._redirects = redirects
        # Set by signals: end; end the data plane too; cut.
        self._stop = asyncio.Event()
        self._with_dataplane = False
        self._again = asyncio.Event()
        self._replacing: asyncio.Task[None] | None = None

    async def run(self) -> int:
        self._take_signals()
        supervising = self._start(self._supervisor.run())
        tasks = [
            supervising,
            self._start(self._source.run()),
            self._start(self._trust.run()),
            self._start(
                self._reconciler.follow(self._pods.events(), once_synced=self._pods.after_sync)
            ),
            self._start(self._reconciler.watch_namespaces()),
            self._start(self._reconciler.precapture.run()),
        ]
        if self._identities is not None:
            tasks.append(self._start(self._identities.run()))
        log.info("agent started", extra={"pid": os.getpid(), "pods": self._pods.name})
        stopping = self._start(self._stop.wait())
        try:
            await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            defect = _defect(tasks)
            if defect is not None:
                # The data plane serves on with what it knows; whoever supervises us starts us anew.
                log.error("agent failed", exc_info=defect)
            await _cancel([supervising])
            if defect is None and self._with_dataplane:
                await self._supervisor.terminate(self._again)
            return EXIT_OK if defect is None else EXIT_FAILED
        finally:
            await _cancel([*tasks, stopping, *([self._replacing] if self._replacing else [])])
            await self._reconciler.close()
            await self._feed.close()
            await self._supervisor.close()
            for redirect in self._redirects:
                if redirect is not None:
                    await redirect.close()
            log.info("agent ended", extra={"dataplane_goes_on": not self._with_dataplane})

    def _take_signals(self) -> None:
        """Design section 5: TERM and INT end the data plane too if we started it (a second one
        cuts), USR2 ends the agent alone, HUP replaces the data plane."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        loop.add_signal_handler(signal.SIGUSR2, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._replace)

    def end(self) -> None:
        """The data plane too if we started it; a second time, at once."""
        if self._stop.is_set():
            self._again.set()
            return
        self._with_dataplane = self._supervisor.owned
        self._stop.set()

    def _replace(self) -> None:
        if self._stop.is_set():
            log.warning("data plane not replaced: the agent is ending")
        elif self._replacing is None or self._replacing.done():
            self._replacing = asyncio.create_task(self._replace_logged(), name="replace")

    async def _replace_logged(self) -> None:
        try:
            await self._supervisor.replace()
        except AgentError as exc:
            log.error("data plane not replaced", extra={"error": exc})

    @staticmethod
    def _start(work: Coroutine[object, object, object]) -> asyncio.Task[object]:
        return asyncio.create_task(work, name=getattr(work, "__qualname__", None))


def _defect(tasks: list[asyncio.Task[object]]) -> BaseException | None:
    """Parts run for ever; one that ended has a defect."""
    for task in tasks:
        if task.done() and not task.cancelled():
            return task.exception() or RuntimeError(f"{task.get_name()} ended by itself")
    return None


async def _cancel(tasks: list[asyncio.Task[object]] | list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
