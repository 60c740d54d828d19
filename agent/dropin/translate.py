"""`translate()`: what upstream's environment says, under the names of our settings."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from agent.dropin import values
from agent.dropin.rows import ROWS
from agent.errors import Mistake
from agent.literal import Literal

# facts ztunnel 14; relative to the working directory, as upstream has them.
MESH_FILE = Path("etc/istio/config/mesh")
ROOT = Path("var/run/secrets/istio/root-cert.pem")
TOKEN = Path("var/run/secrets/tokens/istio-token")
# facts ztunnel 7.1
IN_CLUSTER = "https://istiod.istio-system.svc:15012"
ELSEWHERE = "https://localhost:15012"

# One of these is set wherever upstream's proxy is to run; a RUST_LOG alone means nothing.
MARKERS = (
    "PROXY_MODE",
    "PROXY_WORKLOAD_INFO",
    "PROXY_CONFIG",
    "INPOD_UDS",
    "XDS_ADDRESS",
    "CA_ADDRESS",
    "LOCAL_XDS_PATH",
    "LOCAL_XDS",
)
_OWN_POD = ("POD_NAME", "POD_NAMESPACE", "SERVICE_ACCOUNT")
_META, _META_JSON = "ISTIO_META_", "ISTIO_METAJSON_"
# Settings that exist in this release, for names whose feature doesn't yet.
Known = Callable[[str], bool]


@dataclass(frozen=True)
class Given:
    """A raw value and the place to name when it is wrong."""

    place: str
    raw: object


@dataclass
class Translated:
    # By the names of our settings.
    given: dict[str, Given] = field(default_factory=dict)
    # What upstream would take where nothing is said; only sensible all together.
    defaults: dict[str, Given] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def translate(environ: Mapping[str, str], known: Known, folder: Path = Path()) -> Translated:
    """`folder` is the one that relative paths mean. Nothing at all without one of the MARKERS."""
    out = Translated()
    if any(name in environ for name in MARKERS):
        _Translation(environ, known, folder, out).run()
    return out


class _Translation:
    def __init__(
        self, environ: Mapping[str, str], known: Known, folder: Path, out: Translated
    ) -> None:
        self._environ = environ
        self._known = known
        self._folder = folder
        self._out = out

    def run(self) -> None:
        config = self._proxy_config()
        metadata = self._metadata(config)
        for row in ROWS:
            # An empty one is as none: charts write them for values that nobody set.
            if not row.together and (text := self._environ.get(row.name)):
                if row.ignored:
                    self._out.warnings.append(f"{row.name}: ignored: {row.note}")
                    continue
                self._try(row.name, partial(row.convert, text), row.setting)
        self._sources(config)
        self._pods()
        self._mesh(metadata)
        self._servers(config)
        self._try_named(
            "dataplane.workers",
            lambda: values.workers(self._environ, config.get("concurrency")),
            "ZTUNNEL_WORKER_THREADS",
        )
        self._try_named(
            "dataplane.drain-deadline",
            lambda: values.drain_deadline(self._environ),
            "TERMINATION_GRACE_PERIOD_SECONDS",
        )

    # ---- parts that several names make together

    def _sources(self, config: Mapping[str, object]) -> None:
        """Addresses of the control plane and the authority, their roots, token and headers."""
        environ, out = self._environ, self._out
        local = [name for name in ("LOCAL_XDS_PATH", "LOCAL_XDS") if environ.get(name)]
        if len(local) > 1:
            out.mistakes.append("LOCAL_XDS: either it or LOCAL_XDS_PATH, not both")
        elif local == ["LOCAL_XDS"]:
            self._give("xds.file", "LOCAL_XDS", Literal("LOCAL_XDS", environ["LOCAL_XDS"]))
        discovery = config.get("discoveryAddress")
        usual = IN_CLUSTER if environ.get("KUBERNETES_SERVICE_HOST") else ELSEWHERE
        default = Given("upstream's default", usual)
        if discovery:
            default = Given("PROXY_CONFIG: discoveryAddress", str(discovery))
        for name, setting in (("XDS_ADDRESS", "xds.address"), ("CA_ADDRESS", "ca.address")):
            if environ.get(name):
                self._give(setting, name, environ[name])
            elif name == "XDS_ADDRESS" and (name in environ or local):
                # Empty: no control plane; the file takes its place.
                pass
            elif name in environ:
                out.mistakes.append(f"{name}: is empty; certificates are never made up")
            else:
                out.defaults[setting] = default
        for setting in ("xds.root", "ca.root"):
            out.defaults[setting] = Given("upstream's default", str(self._folder / ROOT))
        if (token := self._folder / TOKEN).exists():
            out.defaults["xds.token"] = Given("upstream's default", str(token))
        for prefix, setting in (("XDS_HEADER_", "xds.headers"), ("CA_HEADER_", "ca.headers")):
            found = _prefixed(environ, prefix)
            if found:
                self._give(setting, f"{prefix}*", found)

    def _pods(self) -> None:
        mode = self._environ.get("PROXY_MODE", "shared")
        if mode == "shared":
            path = self._environ.get("INPOD_UDS")
            self._give("pods", "INPOD_UDS", f"zds:{path}" if path else "zds")
            # facts ztunnel 11.6
            if all(self._environ.get(name) for name in _OWN_POD):
                self._give("stats.hbone", ", ".join(_OWN_POD), True)
        elif mode == "dedicated":
            self._give("pods", "PROXY_WORKLOAD_INFO", self._workload())
        else:
            self._out.mistakes.append(f"PROXY_MODE: {mode!r}: write shared or dedicated")

    def _workload(self) -> str:
        return f"self:{self._environ.get('PROXY_WORKLOAD_INFO', '')}"

    def _mesh(self, metadata: Mapping[str, object]) -> None:
        if metadata:
            self._give("xds.metadata", f"{_META}*", dict(metadata))
        if cluster := self._environ.get("CLUSTER_ID"):
            self._give("cluster-id", "CLUSTER_ID", cluster)
        for name, setting in (
            ("CLUSTER_ID", "cluster-id"),
            ("ISTIO_VERSION", "telemetry.istio-version"),
            ("DNS_CAPTURE", "dns.capture"),
        ):
            if name in metadata:
                self._give(setting, f"{_META}{name}", metadata[name])
        if address := metadata.get("DNS_PROXY_ADDR"):
            self._give("ports.dns", f"{_META}DNS_PROXY_ADDR", str(address).rpartition(":")[2])

    def _servers(self, config: Mapping[str, object]) -> None:
        if (number := config.get("proxyAdminPort")) is not None:
            self._give("admin.address", "PROXY_CONFIG: proxyAdminPort", f"localhost:{number}")
        if (number := config.get("statsPort")) is not None:
            self._give("stats.address", "PROXY_CONFIG: statsPort", f":{number}")

    def _metadata(self, config: Mapping[str, object]) -> dict[str, object]:
        """facts ztunnel 7.2: of ProxyConfig, then of the environment, then the JSON ones."""
        found: dict[str, object] = {}
        given = config.get("proxyMetadata")
        if isinstance(given, Mapping):
            found |= {str(name).removeprefix(_META): str(value) for name, value in given.items()}
        elif given is not None:
            self._out.mistakes.append("PROXY_CONFIG: proxyMetadata: a mapping is wanted")
        found |= _prefixed(self._environ, _META)
        for name, text in _prefixed(self._environ, _META_JSON).items():
            try:
                found[name] = json.loads(text)
            except ValueError as exc:
                self._out.warnings.append(f"{_META_JSON}{name}: ignored: not JSON: {exc}")
        return found

    def _proxy_config(self) -> dict[str, object]:
        """The mesh file's `defaultConfig`, below PROXY_CONFIG."""
        from agent import yaml_text

        texts: list[tuple[str, str]] = []
        mesh = self._folder / MESH_FILE
        try:
            texts.append((str(mesh), mesh.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as exc:
            self._out.mistakes.append(f"{mesh}: can't be read: {exc}")
        if "PROXY_CONFIG" in self._environ:
            texts.append(("PROXY_CONFIG", self._environ["PROXY_CONFIG"]))
        merged: dict[str, object] = {}
        for place, text in texts:
            try:
                content = yaml_text.load(text)
            except yaml_text.NotYaml as exc:
                self._out.mistakes.append(f"{place}: {exc}")
                continue
            if place != "PROXY_CONFIG" and isinstance(content, Mapping):
                content = content.get("defaultConfig")
            if content is not None and not isinstance(content, Mapping):
                self._out.mistakes.append(f"{place}: a mapping is wanted")
            elif content:
                before, now = merged.get("proxyMetadata"), content.get("proxyMetadata")
                merged |= {str(key): value for key, value in content.items()}
                if isinstance(before, Mapping) and isinstance(now, Mapping):
                    merged["proxyMetadata"] = {**before, **now}
        return merged

    # ---- helpers

    def _try(self, name: str, convert: Callable[[], object], setting: str) -> None:
        try:
            raw = convert()
        except Mistake as mistake:
            self._out.mistakes.append(f"{name}: {mistake}")
            return
        if setting:
            self._give(setting, name, raw)

    def _try_named(
        self, setting: str, find: Callable[[], tuple[str, object] | None], blame: str
    ) -> None:
        try:
            found = find()
        except Mistake as mistake:
            self._out.mistakes.append(f"{blame}: {mistake}")
            return
        if found is not None:
            self._give(setting, *found)

    def _give(self, setting: str, place: str, raw: object) -> None:
        if self._known(setting):
            self._out.given[setting] = Given(place, raw)
        else:
            self._out.warnings.append(f"{place}: ignored: comes with a later release")


def _prefixed(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {
        name.removeprefix(prefix): value
        for name, value in sorted(environ.items())
        if name.startswith(prefix) and name != prefix
    }
