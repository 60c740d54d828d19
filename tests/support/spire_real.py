"""A real SPIRE server and agent in one network namespace, from a folder with their binaries."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from agent.cli.demo.mesh import Mesh

PORT = 28081
TRUST_DOMAIN = "cluster.local"
NODE, DELEGATE = f"spiffe://{TRUST_DOMAIN}/node", f"spiffe://{TRUST_DOMAIN}/underpass"

SERVER = """\
server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{folder}/server.sock"
    trust_domain = "{domain}"
    data_dir = "{folder}"
    log_level = "INFO"
    ca_ttl = "1h"
    default_x509_svid_ttl = "40s"
}}
plugins {{
    DataStore "sql" {{
        plugin_data {{ database_type = "sqlite3" connection_string = "{folder}/data.sqlite3" }}
    }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "memory" {{ plugin_data = {{}} }}
}}
"""
AGENT = """\
agent {{
    data_dir = "{folder}/agent"
    log_level = "INFO"
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{folder}/public/api.sock"
    admin_socket_path = "{folder}/admin/admin.sock"
    insecure_bootstrap = true
    trust_domain = "{domain}"
    authorized_delegates = ["{delegate}"]
}}
plugins {{
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "disk" {{ plugin_data {{ directory = "{folder}/agent" }} }}
    WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


@dataclass
class RealSpire:
    """`bin` holds spire-server and spire-agent. Processes belong to the mesh."""

    bin: Path
    mesh: Mesh
    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "admin" / "admin.sock"

    async def start(self) -> None:
        (self.folder / "agent").mkdir(parents=True)
        values = {
            "folder": self.folder,
            "port": PORT,
            "domain": TRUST_DOMAIN,
            "delegate": DELEGATE,
        }
        for name, text in (("server", SERVER), ("agent", AGENT)):
            (self.folder / f"{name}.conf").write_text(text.format(**values))
        await self._spawn("server")

        async def healthy() -> bool:
            return (await self._server("healthcheck"))[0] == 0

        await self.mesh.until("the SPIRE server", healthy, "spire-server")
        _, said = await self._server("token", "generate", "-spiffeID", NODE)
        await self.start_agent("-joinToken", said.split("Token: ")[1].split()[0])

    async def start_agent(self, *arguments: str) -> None:
        self.socket.unlink(missing_ok=True)
        await self._spawn("agent", *arguments)
        await self.mesh.until("the SPIRE agent", self.socket.exists, "spire-agent")

    async def register(self, identity: str, *selectors: str) -> None:
        chosen = [word for selector in selectors for word in ("-selector", selector)]
        entry = ["-parentID", NODE, "-spiffeID", identity, *chosen]
        code, said = await self._server("entry", "create", *entry)
        assert code == 0, said

    async def authority(self, verb: str, *arguments: str) -> str:
        """`prepare`, `activate`, `taint` or `revoke` of the server's X.509 authority."""
        code, said = await self._server("localauthority", "x509", verb, *arguments)
        assert code == 0, said
        return said

    async def _spawn(self, name: str, *arguments: str) -> None:
        command = [str(self.bin / f"spire-{name}"), "run", "-config", f"{self.folder}/{name}.conf"]
        namespace = self.mesh.world.nodes[0].namespace
        await self.mesh.spawn(f"spire-{name}", [*command, *arguments], namespace)

    async def _server(self, *words: str) -> tuple[int | None, str]:
        arguments = [*words, "-socketPath", f"{self.folder}/server.sock"]
        process = await asyncio.create_subprocess_exec(
            self.bin / "spire-server",
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        return process.returncode, out.decode()
