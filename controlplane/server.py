"""Builds the control plane's parts, binds them and serves until told to end."""

import asyncio
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address

import grpc

from controlplane import state_files, status
from controlplane.ca.authority import ROOT_FILE, Authority, AuthorityError, ServerCertificate
from controlplane.ca.service import CertificateService
from controlplane.log import fact
from controlplane.model.mesh import Mesh
from controlplane.model.translate import Translator
from controlplane.model.vips import Ranges
from controlplane.nodes import Nodes
from controlplane.options import (
    EXIT_USAGE,
    Options,
    OptionsError,
    check,
    parse_listen,
    parse_ranges,
)
from controlplane.pipeline import Pipeline
from controlplane.sources.manifests import Manifests
from controlplane.tokens import TokenError, TokenKey
from controlplane.vip_store import VipStore, VipStoreError
from controlplane.wds.discovery import Discovery
from controlplane.wds.index import Index

__all__ = ["ControlPlane", "Options", "OptionsError", "StartError", "run"]

# Streams end when we do; nodes connect again, so nothing is gained by waiting long.
_GRACE = 0.5
_SERVER_OPTIONS = (
    # A port that is taken must fail, not be shared.
    ("grpc.so_reuseport", 0),
    # A node that comes back names every version it holds: 80 bytes each, 100 000 of them.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    # Nodes ping every 30 s (facts ztunnel 7.1); gRPC's default takes that for an attack.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)

_log = logging.getLogger(__name__)


def run(options: Options) -> int:
    """Blocks until SIGTERM or SIGINT. 0: clean end; 64: bad options; 1: can't serve."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        check(options)
        asyncio.run(_serve(options))
    except OptionsError as error:
        for problem in error.problems:
            print(f"underpass controlplane: {problem}", file=sys.stderr)
        return EXIT_USAGE
    except StartError as error:
        print(f"underpass controlplane: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(options: Options) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    plane = await ControlPlane.bind(options)
    try:
        await plane.serve(ended, lambda: print(f"ready {' '.join(plane.addresses)}", flush=True))
    finally:
        await plane.close()
    fact(_log, logging.INFO, "control plane ended")


class StartError(Exception):
    """The control plane can't serve; the text says what to do."""


class ControlPlane:
    """Bound but not serving until `serve`; `close` may follow at any time."""

    def __init__(self, options: Options, lock: int, addresses: list[str]) -> None:
        self.options = options
        self.addresses = addresses
        self.manifests = Manifests(options.manifests)
        self.index = Index()
        self._lock = lock
        self._status = status.StatusFile(options.state)
        self.nodes = Nodes(self._status.touch)

    @classmethod
    async def bind(cls, options: Options) -> "ControlPlane":
        """Takes the state folder, loads or makes keys, binds the addresses. Raises StartError."""
        lock = _take_state(options)
        try:
            plane = cls(options, lock, [])
            await plane._build()
        except BaseException:
            os.close(lock)
            raise
        return plane

    async def _build(self) -> None:
        options = self.options
        v4, v6 = parse_ranges(options.vip_ranges)
        try:
            self.authority = Authority.load(options.state, options.trust_domain)
            key = TokenKey.load(options.state)
            vips = VipStore.load(options.state, Ranges(v4, v6))
        except (AuthorityError, TokenError, VipStoreError) as error:
            raise StartError(str(error)) from error
        mesh = Mesh(
            trust_domain=options.trust_domain,
            cluster_id=options.cluster_id,
            network=options.network,
            root_namespace=options.root_namespace,
        )
        self.pipeline = Pipeline(self.manifests, Translator(mesh), vips, self.index)
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        self._discovery = Discovery(self.index, key, self.nodes)
        self._discovery.register(self._server)
        CertificateService(
            self.authority,
            key,
            options.trust_domain,
            options.certificate_ttl,
            options.max_certificate_ttl,
            self.pipeline.has_pod,
        ).register(self._server)
        for address in options.listen:
            host, _ = parse_listen(address)
            try:
                port = self._server.add_secure_port(address, _credentials(self.authority, options))
            except RuntimeError as error:
                raise StartError(
                    f"--listen {address}: can't be bound: is the port taken, or the address not "
                    "this machine's?"
                ) from error
            self.addresses.append(f"{host}:{port}")

    async def serve(self, ended: asyncio.Event, started: Callable[[], None] = lambda: None) -> None:
        """Reads manifests, serves, calls `started`, ends with `ended`. Raises what breaks it."""
        await self.manifests.load()
        self.pipeline.refresh()
        await self._server.start()
        fact(
            _log,
            logging.INFO,
            "control plane ready",
            addresses=",".join(self.addresses),
            trust_domain=self.options.trust_domain,
            root=self.options.state / ROOT_FILE,
            manifests=self.options.manifests,
        )
        started()
        tasks = [
            asyncio.create_task(self.manifests.run(self._changed)),
            asyncio.create_task(self._status.run(self.view)),
            asyncio.create_task(ended.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Ends streams, frees ports and the state folder."""
        self._discovery.end()
        await self._server.stop(_GRACE)
        self._status.remove()
        os.close(self._lock)

    def view(self) -> Mapping[str, object]:
        return status.view(self.manifests, self.pipeline, self.index, self.nodes, self.addresses)

    def _changed(self) -> None:
        self.pipeline.refresh()
        self._status.touch()


def _take_state(options: Options) -> int:
    """The folder is locked as long as the descriptor is open."""
    path = options.state / "lock"
    try:
        state_files.ensure_folder(options.state)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, state_files.SECRET)
    except OSError as error:
        raise StartError(f"--state {options.state}: {error.strerror}: name another") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StartError(
            f"--state {options.state}: another control plane uses it: end that one or name another"
        ) from error
    return lock


def _credentials(authority: Authority, options: Options) -> grpc.ServerCredentials:
    """A certificate that is renewed at half life, asked for at each handshake. Of one port only:
    the library takes "unchanged" from a port that has none yet as a failure."""
    names = _server_names(options)
    fetch = _renewing(lambda: authority.issue_server(names))
    first = fetch()
    assert first is not None  # the first call always issues
    # None means "unchanged" there, which the published types don't know.
    return grpc.dynamic_ssl_server_credentials(first, fetch)  # type: ignore[arg-type]


def _renewing(
    issue: Callable[[], ServerCertificate],
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    current: ServerCertificate | None = None

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        if current is not None and datetime.now(UTC) < current.renew_at:
            return None
        current = issue()
        return grpc.ssl_server_certificate_configuration([(current.key, current.chain)])

    return fetch


def _server_names(options: Options) -> list[str]:
    names = ["localhost", "127.0.0.1", "::1"]
    for address in options.listen:
        host = parse_listen(address)[0].strip("[]")
        if not _unspecified(host):
            names.append(host)
    return [*names, *options.extra_sans]


def _unspecified(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False
