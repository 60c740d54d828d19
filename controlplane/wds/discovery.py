"""The Delta ADS service (facts istio-ambient 6.10): each stream is sent only what it lacks."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc

from controlplane.log import fact
from controlplane.nodes import Connected, Nodes, UnauthenticatedError, authenticate
from controlplane.tokens import NodeToken, TokenKey
from controlplane.wds.encoding import ADDRESS, AUTHORIZATION, TYPES
from controlplane.wds.index import Index, Update
from proto.gen import discovery_pb2

_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
# Nonces of a client that never answers are forgotten beyond this many.
_OUTSTANDING = 256

Context: TypeAlias = "grpc.aio.ServicerContext[discovery_pb2.DeltaDiscoveryRequest, bytes]"

_log = logging.getLogger(__name__)


class Discovery:
    """Registered without a serialiser: streams write bytes that were encoded once for all."""

    def __init__(self, index: Index, key: TokenKey, nodes: Nodes) -> None:
        self._index = index
        self._key = key
        self._nodes = nodes
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Ends all streams in words, so that nodes know it was meant and connect again."""
        self._ending.set()

    def register(self, server: grpc.aio.Server) -> None:
        method = grpc.stream_stream_rpc_method_handler(
            self._serve, request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString
        )
        handler = grpc.method_handlers_generic_handler(
            _SERVICE, {"DeltaAggregatedResources": method}
        )
        server.add_generic_rpc_handlers((handler,))

    async def _serve(
        self,
        requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        context: Context,
    ) -> None:
        try:
            token = authenticate(context.invocation_metadata(), self._key)
        except UnauthenticatedError as error:
            fact(_log, logging.WARNING, "node refused", peer=context.peer(), reason=error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        entry = self._nodes.opened(token.node, context.peer())
        fact(_log, logging.INFO, "node connected", node=token.node, peer=entry.peer)
        try:
            stream = _Stream(self._index, self._nodes, entry, token, context)
            await stream.run(requests, self._ending)
        except RefusedError as error:
            fact(_log, logging.WARNING, "stream refused", node=token.node, reason=error)
            await context.abort(error.code, str(error))
        finally:
            self._nodes.closed(entry)
            fact(_log, logging.INFO, "node disconnected", node=token.node, peer=entry.peer)


class RefusedError(Exception):
    """Ends the stream with this status; the text is for the node's log."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Stream:
    """One node's stream. One task reads, waits and writes, so nothing here needs a lock."""

    def __init__(
        self,
        index: Index,
        nodes: Nodes,
        entry: Connected,
        token: NodeToken,
        context: Context,
    ) -> None:
        self._index = index
        self._nodes = nodes
        self._entry = entry
        self._token = token
        self._context = context
        self._known_node = False
        self._first = 0
        # The generation up to which each subscribed type was sent.
        self._sent: dict[str, int] = {}
        self._outstanding: dict[str, None] = {}

    async def run(
        self,
        requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        ending: asyncio.Event,
    ) -> None:
        ended = asyncio.ensure_future(ending.wait())
        reading = asyncio.ensure_future(anext(requests, None))
        changed = asyncio.ensure_future(self._index.after(self._index.generation))
        try:
            while True:
                left = self._token.expires - time.time()
                done, _ = await asyncio.wait(
                    {reading, changed, ended},
                    timeout=max(left, 0),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if time.time() >= self._token.expires:
                    raise RefusedError(
                        grpc.StatusCode.UNAUTHENTICATED,
                        f"the token of node {self._token.node} has expired: make a new one with "
                        f"`underpass controlplane token --node {self._token.node}`",
                    )
                if ended in done:
                    raise RefusedError(
                        grpc.StatusCode.UNAVAILABLE, "the control plane is ending: connect again"
                    )
                if reading in done:
                    request = reading.result()
                    if request is None:
                        return
                    await self._on_request(request)
                    reading = asyncio.ensure_future(anext(requests, None))
                if changed in done:
                    await self._push()
                    oldest = min(self._sent.values(), default=self._index.generation)
                    changed = asyncio.ensure_future(self._index.after(oldest))
        finally:
            for task in (reading, changed, ended):
                task.cancel()

    async def _on_request(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        if not self._known_node:
            self._check_node(request)
            self._known_node = True
        if request.type_url not in TYPES:
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"type {request.type_url!r} is not served here: known are {', '.join(TYPES)}",
            )
        if request.response_nonce or request.HasField("error_detail"):
            self._on_answer(request)
        if request.type_url not in self._sent:
            await self._subscribe(request)

    def _check_node(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        if not request.HasField("node"):
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "missing node information")
        fields = request.node.metadata.fields
        name = fields["NODE_NAME"].string_value if "NODE_NAME" in fields else ""
        if name != self._token.node:
            raise RefusedError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"metadata NODE_NAME is {name!r} but the token is of node {self._token.node!r}: "
                "use this node's own token",
            )

    async def _subscribe(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        names = [name for name in request.resource_names_subscribe if name != "*"]
        if names or "*" in request.resource_names_unsubscribe:
            raise RefusedError(
                grpc.StatusCode.UNIMPLEMENTED,
                "only wildcard subscriptions are served: turn on-demand discovery off",
            )
        self._first += 1
        update = self._index.first(
            request.type_url, dict(request.initial_resource_versions), f"first-{self._first}"
        )
        self._sent[request.type_url] = self._index.generation
        await self._write(request.type_url, update)

    def _on_answer(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        nonce = f"{request.type_url} {request.response_nonce}"
        if request.HasField("error_detail"):
            self._entry.nacks += 1
            self._entry.last_nack = request.error_detail.message
            fact(
                _log,
                logging.ERROR,
                "resources rejected",
                node=self._token.node,
                type=request.type_url,
                nonce=request.response_nonce,
                reason=request.error_detail.message,
            )
            self._nodes.touched()
        elif nonce in self._outstanding:
            self._entry.acks += 1
            fact(
                _log,
                logging.DEBUG,
                "resources accepted",
                node=self._token.node,
                type=request.type_url,
                nonce=request.response_nonce,
            )
        self._outstanding.pop(nonce, None)

    async def _push(self) -> None:
        """New policies go before the workloads that list them, old ones after.

        All updates are taken before the first write: the index may move on while one waits.
        """
        if not all(self._index.holds(generation) for generation in self._sent.values()):
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, "too far behind: connect again with your versions"
            )
        updates = [
            (type_url, self._index.since(type_url, self._sent[type_url], **which))
            for type_url, which in (
                (AUTHORIZATION, {"removals": False}),
                (ADDRESS, {}),
                (AUTHORIZATION, {"upserts": False}),
            )
            if type_url in self._sent
        ]
        for type_url in self._sent:
            self._sent[type_url] = self._index.generation
        for type_url, update in updates:
            if update is not None:
                await self._write(type_url, update)

    async def _write(self, type_url: str, update: Update) -> None:
        self._outstanding[f"{type_url} {update.nonce}"] = None
        if len(self._outstanding) > _OUTSTANDING:
            del self._outstanding[next(iter(self._outstanding))]
        self._entry.pushes += 1
        self._entry.resources += update.resources
        await self._context.write(update.data)
