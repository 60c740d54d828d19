"""A CA whose root rotates by a step with each SIGUSR1, as a process: ADDRESS FOLDER.

Puts `root.pem` (of its own endpoint) into the folder, and `stage` when a step is done. The steps
are those of a mesh that changes its root without an outage: hand out both roots, sign by the new
one, leave the old one out.
"""

import asyncio
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from proto.gen import citadel_pb2
from tests.support.small_ca import SmallCa

OLD, NEW = SmallCa("mesh root"), SmallCa("mesh root")
# Renewed at half of it: no step waits long to be noticed.
LIFE = timedelta(seconds=16)
# (who signs, whose roots are handed out)
STAGES = [(OLD, [OLD]), (OLD, [OLD, NEW]), (NEW, [OLD, NEW]), (NEW, [NEW])]


class Rotation:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stage = 0
        self._tell()

    def step(self) -> None:
        self.stage = min(self.stage + 1, len(STAGES) - 1)
        self._tell()

    async def create(
        self,
        request: citadel_pb2.IstioCertificateRequest,
        context: "grpc.aio.ServicerContext[object, object]",
    ) -> citadel_pb2.IstioCertificateResponse:
        identity = request.metadata.fields["ImpersonatedIdentity"].string_value
        signer, roots = STAGES[self.stage]
        now = datetime.now(UTC)
        leaf = signer.workload(request.csr, identity, not_before=now, not_after=now + LIFE)
        bundle = "".join(ca.root_pem for ca in roots)
        return citadel_pb2.IstioCertificateResponse(cert_chain=[leaf, bundle])

    def _tell(self) -> None:
        (self.folder / "stage").write_text(str(self.stage))


async def serve(address: str, folder: Path) -> None:
    endpoint = SmallCa("endpoint")
    (folder / "root.pem").write_text(endpoint.root_pem)
    rotation = Rotation(folder)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, rotation.step)
    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(
        rotation.create,
        citadel_pb2.IstioCertificateRequest.FromString,
        citadel_pb2.IstioCertificateResponse.SerializeToString,
    )
    service = "istio.v1.auth.IstioCertificateService"
    handler = grpc.method_handlers_generic_handler(service, {"CreateCertificate": method})
    server.add_generic_rpc_handlers((handler,))
    host = address.rpartition(":")[0]
    server.add_secure_port(address, grpc.ssl_server_credentials([endpoint.server(host)]))
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))
