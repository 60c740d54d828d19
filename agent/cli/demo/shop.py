"""The demo's shop: six pods on two nodes, with nginx and a TCP echo as servers."""

import sys
from dataclasses import dataclass
from pathlib import Path

from agent.cli.demo import manifests
from agent.cli.demo.manifests import Pod
from agent.cli.demo.mesh import Mesh

NAMESPACE = "shop"
HTTP_PORT = 8080
ECHO_PORT = 9000

NGINX = """\
daemon off;
master_process off;
pid {folder}/{name}.nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  default_type text/plain;
  client_body_temp_path {folder}/{name}.nginx;
  proxy_temp_path {folder}/{name}.nginx;
  fastcgi_temp_path {folder}/{name}.nginx;
  uwsgi_temp_path {folder}/{name}.nginx;
  scgi_temp_path {folder}/{name}.nginx;
  keepalive_requests 1000000;
  server {{
    listen 0.0.0.0:{port} backlog=1024;
    listen [::]:{port} backlog=1024;
    location / {{ return 200 "{name} sees $remote_addr asking for $request_uri\\n"; }}
  }}
}}
"""


@dataclass(frozen=True)
class Shop:
    """`web` calls `api` (HTTP) and `db` (server-first TCP) on the other node; `cart` is an echo
    beside `web`; `batch` may be told to keep away from `db`; `legacy` is outside the mesh."""

    web: Pod
    cart: Pod
    legacy: Pod
    api: Pod
    db: Pod
    batch: Pod


def build(mesh: Mesh) -> Shop:
    """Makes the sandboxes and the manifests; starts nothing."""
    one, two = mesh.world.nodes

    def pod(node_index: int, name: str, *, ambient: bool = True) -> Pod:
        node = (one, two)[node_index - 1]
        return Pod(mesh.world.add_pod(node, name), NAMESPACE, name, ambient=ambient)

    shop = Shop(
        web=pod(1, "web"),
        cart=pod(1, "cart"),
        legacy=pod(1, "legacy", ambient=False),
        api=pod(2, "api"),
        db=pod(2, "db"),
        batch=pod(1, "batch"),
    )
    mesh.apply("namespace", manifests.namespace(NAMESPACE))
    mesh.apply(
        "services",
        manifests.service("api", NAMESPACE, 80, HTTP_PORT, {"app": "api"}),
        manifests.service("db", NAMESPACE, ECHO_PORT, ECHO_PORT, {"app": "db"}),
    )
    mesh.add(shop.web, shop.cart, shop.legacy, shop.api, shop.db, shop.batch)
    return shop


async def serve_http(mesh: Mesh, pod: Pod) -> None:
    """A real nginx that says who asked."""
    folder = mesh.folder
    (folder / f"{pod.name}.nginx").mkdir(exist_ok=True)
    conf = folder / f"{pod.name}.nginx.conf"
    conf.write_text(NGINX.format(folder=folder, name=pod.name, port=HTTP_PORT))
    arguments = [nginx(), "-p", str(folder), "-e", "stderr", "-c", str(conf)]
    await mesh.spawn(pod.name, arguments, pod.sandbox.namespace)


async def serve_echo(mesh: Mesh, pod: Pod) -> None:
    arguments = [sys.executable, "-m", "agent.cli.demo.echo", pod.name, str(ECHO_PORT)]
    await mesh.spawn(pod.name, arguments, pod.sandbox.namespace)


def nginx() -> str:
    """Debian keeps it where an ordinary user's PATH doesn't look."""
    return next((p for p in ("/usr/sbin/nginx", "/usr/bin/nginx") if Path(p).exists()), "nginx")
