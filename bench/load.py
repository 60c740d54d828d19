"""Load generators: iperf3 for streams, wrk for requests and new connections.

Each runs inside the client's namespace for a few seconds and returns what it counted itself.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh
from agent.cli.demo.shop import HTTP_PORT, serve_http

IPERF_PORT = 5201


class LoadError(Exception):
    """A generator failed or counted failures; the text holds what it said."""


@dataclass(frozen=True)
class Count:
    """What one run moved: `amount` gigabytes, requests or connections."""

    amount: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


async def serve(mesh: Mesh, pod: Pod) -> None:
    """Starts both servers of a pod; returns when they listen."""
    await serve_http(mesh, pod)
    iperf = ["iperf3", "--server", "--port", str(IPERF_PORT)]
    await mesh.spawn(f"{pod.name}-iperf", iperf, pod.sandbox.namespace)
    for port, name in ((HTTP_PORT, pod.name), (IPERF_PORT, f"{pod.name}-iperf")):

        async def listens(port: int = port) -> bool:
            seen = await _run(pod, ["ss", "-Hltn", f"sport = :{port}"])
            return bool(seen.strip())

        await mesh.until(f"port {port} of {pod.name}", listens, name, seconds=10)


async def streams(client: Pod, server: Pod, count: int, seconds: float) -> Count:
    """Gigabytes received over `count` TCP streams."""
    text = await _run(
        client,
        [
            *("iperf3", "--client", server.sandbox.ipv4, "--port", str(IPERF_PORT), "--json"),
            *("--parallel", str(count), "--time", str(round(seconds))),
        ],
        seconds,
    )
    try:
        received = json.loads(text)["end"]["sum_received"]
        return Count(received["bytes"] / 1e9, received["seconds"])
    except (ValueError, KeyError) as error:
        raise LoadError(f"iperf3 said: {text[-400:]}") from error


async def requests(client: Pod, server: Pod, connections: int, seconds: float) -> Count:
    """HTTP requests on connections that are kept."""
    return await _wrk(client, server, connections, seconds, [])


async def connections(client: Pod, server: Pod, clients: int, seconds: float) -> Count:
    """Connections made, one request each."""
    return await _wrk(client, server, clients, seconds, ["--header", "Connection: close"])


async def _wrk(
    client: Pod, server: Pod, connections: int, seconds: float, options: Sequence[str]
) -> Count:
    text = await _run(
        client,
        [
            *("wrk", "--threads", "1", "--connections", str(connections)),
            *("--duration", f"{round(seconds)}s", *options),
            f"http://{server.sandbox.ipv4}:{HTTP_PORT}/",
        ],
        seconds,
    )
    return parse_wrk(text)


def parse_wrk(text: str) -> Count:
    """Raises LoadError when wrk saw errors: a rate of failures is no result."""
    done = re.search(r"(\d+) requests in ([\d.]+)(ms|s|m)", text)
    if done is None:
        raise LoadError(f"wrk said: {text[-400:]}")
    if found := re.search(r"Socket errors:.*|Non-2xx or 3xx responses:.*", text):
        raise LoadError(f"wrk: {found.group()} of {done.group(1)} requests")
    unit = {"ms": 0.001, "s": 1.0, "m": 60.0}[done.group(3)]
    return Count(float(done.group(1)), float(done.group(2)) * unit)


async def _run(pod: Pod, arguments: Sequence[str], seconds: float = 0.0) -> str:
    """A command inside the pod; killed when it takes far longer than it should."""
    namespace = f"--net=/run/netns/{pod.sandbox.namespace}"
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", "nsenter", namespace),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds + 20):
            out, err = await process.communicate()
    except BaseException as error:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if isinstance(error, TimeoutError):
            raise LoadError(f"{arguments[0]} hangs in {pod.name}") from error
        raise
    if process.returncode:
        said = (err + out).decode(errors="replace").strip()
        raise LoadError(f"{arguments[0]} in {pod.name} ended with {process.returncode}: {said}")
    return out.decode()
