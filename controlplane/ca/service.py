"""CreateCertificate: a node asks on behalf of a pod's account that runs on it."""

import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeAlias

import grpc

from controlplane.ca.authority import Authority, CsrError, named_by
from controlplane.log import fact
from controlplane.nodes import UnauthenticatedError, authenticate
from controlplane.tokens import TokenKey
from proto.gen import citadel_pb2

_SERVICE = "istio.v1.auth.IstioCertificateService"
_METADATA = "ImpersonatedIdentity"

Request: TypeAlias = citadel_pb2.IstioCertificateRequest
Response: TypeAlias = citadel_pb2.IstioCertificateResponse
Context: TypeAlias = "grpc.aio.ServicerContext[Request, Response]"

_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The request ends with this status; the text is for the node's log."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class CertificateService:
    """`has_pod(node, namespace, account)` may wait a moment for a pod that was just written."""

    def __init__(
        self,
        authority: Authority,
        key: TokenKey,
        trust_domain: str,
        ttl: timedelta,
        max_ttl: timedelta,
        has_pod: Callable[[str, str, str], Awaitable[bool]],
    ) -> None:
        self._authority = authority
        self._key = key
        self._trust_domain = trust_domain
        self._ttl = ttl
        self._max_ttl = max_ttl
        self._has_pod = has_pod

    def register(self, server: grpc.aio.Server) -> None:
        method = grpc.unary_unary_rpc_method_handler(
            self._create,
            request_deserializer=citadel_pb2.IstioCertificateRequest.FromString,
            response_serializer=citadel_pb2.IstioCertificateResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(_SERVICE, {"CreateCertificate": method})
        server.add_generic_rpc_handlers((handler,))

    async def _create(self, request: Request, context: Context) -> Response:
        node = ""
        # A dedicated proxy names its one workload in the CSR alone (facts ztunnel 1.5).
        identity = _impersonated(request) or named_by(request.csr)
        try:
            node = authenticate(context.invocation_metadata(), self._key).node
            await self._authorize(node, identity)
            chain = self._sign(request, identity)
        except UnauthenticatedError as error:
            refused = RefusedError(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except RefusedError as error:
            refused = error
        else:
            fact(_log, logging.INFO, "certificate issued", node=node, identity=identity)
            return Response(cert_chain=chain)
        fact(
            _log,
            logging.WARNING,
            "certificate refused",
            node=node or context.peer(),
            identity=identity,
            reason=refused,
        )
        return await context.abort(refused.code, str(refused))

    async def _authorize(self, node: str, identity: str) -> None:
        namespace, account = self._parse(identity)
        if not await self._has_pod(node, namespace, account):
            raise RefusedError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"node {node} has no pod of service account {namespace}/{account}: a node may ask "
                "only for accounts of pods whose spec.nodeName names it",
            )

    def _parse(self, identity: str) -> tuple[str, str]:
        """(namespace, account) of an identity of this mesh."""
        if not identity:
            raise RefusedError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"metadata {_METADATA} is missing, and the CSR names no identity: nodes ask on "
                "behalf of pods only",
            )
        parts = identity.removeprefix("spiffe://").split("/")
        shape = len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa" and all(parts)
        if not identity.startswith("spiffe://") or not shape:
            raise RefusedError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{identity!r} is not of the form spiffe://<trust domain>/ns/<ns>/sa/<account>",
            )
        if parts[0] != self._trust_domain:
            raise RefusedError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"trust domain {parts[0]!r} isn't this mesh's, which is {self._trust_domain!r}",
            )
        return parts[2], parts[4]

    def _sign(self, request: Request, identity: str) -> list[str]:
        asked = request.validity_duration
        if asked > self._max_ttl.total_seconds():
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"requested TTL {asked}s is greater than the maximum of "
                f"{int(self._max_ttl.total_seconds())}s",
            )
        ttl = timedelta(seconds=asked) if asked > 0 else self._ttl
        try:
            return self._authority.sign_workload(request.csr, identity, ttl)
        except CsrError as error:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"CSR: {error}") from error


def _impersonated(request: Request) -> str:
    fields = request.metadata.fields
    return str(fields[_METADATA].string_value) if _METADATA in fields else ""
