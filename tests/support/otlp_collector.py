"""A collector of OpenTelemetry's protocol over gRPC, inside a network namespace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from agent.cli.demo.netns import inside
from proto.gen import otlp_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVICES: dict[str, Callable[[bytes], object]] = {
    "opentelemetry.proto.collector.trace.v1.TraceService": otlp_pb2.ExportTraces.FromString,
    "opentelemetry.proto.collector.logs.v1.LogsService": otlp_pb2.ExportLogs.FromString,
}


class Collector:
    """Keeps what it gets, each span and record with the attributes of its resource."""

    def __init__(self, namespace: str, address: str) -> None:
        self.spans: list[tuple[dict[str, object], otlp_pb2.Span]] = []
        self.records: list[tuple[dict[str, object], otlp_pb2.LogRecord]] = []
        self._server = inside(namespace, lambda: self._start(address))

    def close(self) -> None:
        self._server.stop(None).wait(5)

    def _start(self, address: str) -> grpc.Server:
        server = grpc.server(ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(
                    service, {"Export": _handler(parse, self._take)}
                )
                for service, parse in _SERVICES.items()
            )
        )
        if not server.add_insecure_port(address):
            raise OSError(f"{address}: no socket")
        server.start()
        return server

    def _take(
        self, request: otlp_pb2.ExportTraces | otlp_pb2.ExportLogs, _: grpc.ServicerContext
    ) -> otlp_pb2.ExportReply:
        if isinstance(request, otlp_pb2.ExportTraces):
            for traces in request.resource_spans:
                origin = attributes(traces.resource.attributes)
                self.spans += [(origin, span) for part in traces.scope_spans for span in part.spans]
        else:
            for logs in request.resource_logs:
                origin = attributes(logs.resource.attributes)
                self.records += [(origin, r) for part in logs.scope_logs for r in part.log_records]
        return otlp_pb2.ExportReply()


def attributes(pairs: object) -> dict[str, object]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value"))
        for pair in pairs  # type: ignore[attr-defined]
    }


def _handler(
    parse: Callable[[bytes], object], take: Callable[..., otlp_pb2.ExportReply]
) -> grpc.RpcMethodHandler[object, otlp_pb2.ExportReply]:
    return grpc.unary_unary_rpc_method_handler(
        take,
        request_deserializer=parse,
        response_serializer=otlp_pb2.ExportReply.SerializeToString,
    )
