"""`load()`: the one reader of flags, environment and file. Each part receives only its slice."""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent import dropin, settings, values
from agent.errors import ConfigErrors, Mistake
from agent.pods import choice
from agent.settings import SETTINGS, Setting
from agent.slices import (
    Authority,
    Capture,
    Config,
    ControlPlane,
    DataplaneProcess,
    Dns,
    Ebpf,
    Http2,
    Keepalive,
    Limits,
    Log,
    Node,
    Ports,
    RunPaths,
    Servers,
    Source,
    Spire,
    Telemetry,
    Trust,
    Wire,
)

__all__ = ["Config", "ConfigErrors", "load"]

_CHOICE = ("xds.address", "xds.file")
_OF_CA = ("ca.address", "ca.root", "ca.token", "ca.alt-hostname", "ca.headers", "ca.ttl")
BINARY = "underpass-dataplane"
CONFIG_FILE_ENV = f"{settings.ENV_PREFIX}CONFIG"


def load(
    options: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None
) -> Config:
    """A flag wins over the environment, that over the file, that over the default.

    `options` holds flags by `Setting.option`; None and () mean "not given". Raises ConfigErrors
    with all mistakes of all three places.
    """
    if file is None and environ.get(CONFIG_FILE_ENV):
        file = Path(environ[CONFIG_FILE_ENV])
    reader = _Reader(options, environ, file)
    config = _assemble(reader)
    if reader.mistakes or config is None:
        raise ConfigErrors(reader.mistakes)
    return config


class _Reader:
    """Values by name, with the place each came from for messages. Collects mistakes."""

    def __init__(
        self, options: Mapping[str, object], environ: Mapping[str, str], file: Path | None
    ) -> None:
        self.mistakes: list[str] = []
        self.warnings: list[str] = []
        self.environ = environ
        in_file = self._read_file(file)
        self._values: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        upstream = dropin.translate(environ, _is_setting)
        self.mistakes += upstream.mistakes
        self.warnings += upstream.warnings
        for setting in SETTINGS:
            self._values[setting.name] = setting.default
            self._places[setting.name] = "default"
            for place, raw in (
                *self._outside(setting, options),
                (f"{file}: {setting.name}", in_file.pop(setting.name, None)),
            ):
                if raw is not None and raw != ():
                    self._take(setting, place, raw)
                    break
        self._fill(upstream)
        known = {setting.name for setting in SETTINGS}
        self.mistakes += [
            f"{file}: {name}: unknown setting" for name in in_file if name not in known
        ]
        envs = {setting.env for setting in SETTINGS if not setting.only_in_file}
        envs.add(CONFIG_FILE_ENV)
        # Not a mistake: Kubernetes itself puts NAME_SERVICE_HOST and the like there.
        self.warnings += [
            f"{name}: no such setting, ignored"
            for name in sorted(environ)
            if name.startswith(settings.ENV_PREFIX) and name not in envs
        ]

    def _fill(self, upstream: dropin.Translated) -> None:
        """Upstream's words, below all of ours."""
        ours = {name for name in ("xds.address", "xds.file", "ca.address") if self.given(name)}
        given = upstream.given
        if ours & {"xds.address", "xds.file"}:
            # One of the two is chosen already.
            given = {name: entry for name, entry in given.items() if name not in _CHOICE}
        defaults = upstream.defaults
        if ours:
            # An address of upstream's beside ours goes with upstream's roots and token.
            beside = {"ca.root", "xds.token"} if "ca.address" in given.keys() - ours else set()
            defaults = {name: entry for name, entry in defaults.items() if name in beside}
        given = defaults | given
        if self.given("ca.spire-socket"):
            given = {name: entry for name, entry in given.items() if name not in _OF_CA}
        for setting in SETTINGS:
            if setting.name in given and not self.given(setting.name):
                self._take(setting, given[setting.name].place, given[setting.name].raw)

    def _outside(
        self, setting: Setting, options: Mapping[str, object]
    ) -> tuple[tuple[str, object], ...]:
        if setting.only_in_file:
            return ()
        return (
            (setting.flag, options.get(setting.option)),
            (setting.env, self.environ.get(setting.env)),
        )

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def all_of(self, prefix: str, slice_type: type) -> dict[str, Any]:
        """The fields of a slice, each from the setting of its name below `prefix`."""
        names = slice_type.__dataclass_fields__  # type: ignore[attr-defined]
        return {name: self[f"{prefix}.{name.replace('_', '-')}"] for name in names}

    def given(self, name: str) -> bool:
        return self._places[name] != "default"

    def kind(self, name: str) -> str:
        """flag, environment, file or default."""
        place = self._places[name]
        if place.startswith("--"):
            return "flag"
        known = {"default": "default", Setting(name, str, None, "").env: "environment"}
        return known.get(place, "file")

    def wrong(self, name: str, what: str) -> None:
        place = self._places[name]
        if place == "default":
            setting = next(entry for entry in SETTINGS if entry.name == name)
            place = f"{name} ({setting.flag}, {setting.env})"
        self.mistakes.append(f"{place}: {what}")

    def _take(self, setting: Setting, place: str, raw: object) -> None:
        self._places[setting.name] = place
        try:
            self._values[setting.name] = setting.parse(raw)
        except Mistake as mistake:
            self.mistakes.append(f"{place}: {_shown(raw)}: {mistake}")

    def _read_file(self, file: Path | None) -> dict[str, object]:
        if file is None:
            return {}
        from agent import yaml_text

        try:
            content = yaml_text.load(file.read_text(encoding="utf-8"))
        except OSError as exc:
            self.mistakes.append(f"{file}: can't be read: {exc.strerror}")
            return {}
        except UnicodeDecodeError as exc:
            self.mistakes.append(f"{file}: not text: {exc}")
            return {}
        except yaml_text.NotYaml as exc:
            self.mistakes.append(f"{file}: {exc}")
            return {}
        if content is None:
            return {}
        if not isinstance(content, dict):
            self.mistakes.append(f"{file}: a mapping of settings is wanted")
            return {}
        return _flattened(content)


def _is_setting(name: str) -> bool:
    return any(setting.name == name for setting in SETTINGS)


def _flattened(content: Mapping[object, object], prefix: str = "") -> dict[str, object]:
    """`xds: {address: x}` becomes `xds.address`; a setting that is a mapping itself stays whole."""
    names = {setting.name for setting in SETTINGS}
    flat: dict[str, object] = {}
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict) and name not in names:
            flat |= _flattened(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _assemble(reader: _Reader) -> Config | None:
    """Checks that need several settings or the machine. None only when mistakes were found."""
    node = _node(reader)
    source, authority, spire = _source(reader), _authority(reader), _spire(reader)
    dataplane = _dataplane(reader, node.name)
    root = reader["run-dir"] / node.name
    longest = len(str(root / "dataplane-9999.sock"))
    if longest > values.SOCKET_PATH_LIMIT:
        reader.wrong("run-dir", f"too long by {longest - values.SOCKET_PATH_LIMIT} for a socket")
    ports = _ports(reader)
    if reader["pods"] is None and not reader.given("pods"):
        reader.wrong("pods", f"is needed; {choice.WAYS}")
    mode, own = _capture_mode(reader), _own_workload(reader)
    pods_cgroup = _named_cgroup(reader, "pods-cgroup", mode)
    kubelet_cgroup = _named_cgroup(reader, "kubelet-cgroup", mode)
    ebpf, no_ebpf = _ebpf(reader, node.name, pods_cgroup, mode)
    if ebpf and kubelet_cgroup and ebpf.pods_cgroup.is_relative_to(kubelet_cgroup):
        what = f"{kubelet_cgroup}: the pods are in it, too ({ebpf.pods_cgroup}), and would pass for"
        reader.wrong("kubelet-cgroup", f"{what} the kubelet; name its own")
    if reader.mistakes:
        return None
    return Config(
        node=node,
        paths=RunPaths(root),
        pods=reader["pods"],
        capture=Capture(
            mode=mode,
            ipv6=reader["ipv6"],
            ports=ports,
            mark=reader["mark"],
            verify_interval=reader["verify-interval"],
            cut_precapture=reader["cut-precapture"],
            prove_interval=reader["prove-interval"],
            kubelet_cgroup=kubelet_cgroup,
            kubelet_probe_fallback=reader["kubelet-probe-fallback"],
            ebpf=ebpf,
            no_ebpf=no_ebpf,
        ),
        source=source,
        authority=authority,
        spire=spire,
        trust=Trust(**reader.all_of("trust", Trust)),
        dataplane=dataplane,
        servers=Servers(
            stats=reader["stats.address"],
            ready=reader["ready.address"],
            admin=reader["admin.address"],
            allow_changes=reader["admin.allow-changes"],
            hbone=own,
        ),
        log=Log(**reader.all_of("log", Log)),
        telemetry=Telemetry(**reader.all_of("telemetry", Telemetry)),
        limits=Limits(**reader.all_of("limits", Limits)),
        wire=Wire(
            original_source=reader["original-source"],
            localhost_app_tunnel=reader["localhost-app-tunnel"],
            response_baggage=reader["response-baggage"],
            http2=Http2(**reader.all_of("http2", Http2)),
            keepalive=Keepalive(**reader.all_of("keepalive", Keepalive)),
        ),
        dns=Dns(**reader.all_of("dns", Dns)),
        namespaces=reader["namespaces"],
        warnings=tuple(reader.warnings),
    )


def _capture_mode(reader: _Reader) -> str:
    mode, pods = reader["capture"], reader["pods"]
    if pods is None:
        return str(mode)
    if pods.kind == "zds" and mode in ("nftables", "ebpf"):
        reader.wrong("capture", "the ZDS server redirects its pods' traffic itself; write external")
    return "external" if mode == "auto" and pods.redirected_elsewhere else str(mode)


def _ebpf(
    reader: _Reader, node: str, pods_cgroup: Path | None, mode: str
) -> tuple[Ebpf | None, str]:
    """Or why there can't be one, a mistake where it was asked for. On a node that captures another
    way single pods may ask for it."""
    if mode in ("external", "none"):
        return None, ""
    mount = cgroup2_mount()
    kubepods = [mount / "kubepods.slice", mount / "kubepods"] if mount else []
    chosen = pods_cgroup or next((path for path in kubepods if path.is_dir()), None)
    lacks = {}
    if mount is None:
        lacks["capture"] = "ebpf needs cgroup2: mount it, or choose nftables"
    elif chosen is None or not chosen.is_dir():
        missing = chosen or f"no kubepods below {mount}"
        lacks["pods-cgroup"] = f"{missing}: name the cgroup above all processes of all pods"
    if reader["dataplane.cgroup-parent"] == "none":
        lacks["dataplane.cgroup-parent"] = "ebpf needs a cgroup of the data plane"
    if mode == "auto" and reader["dataplane.socket"] is not None:
        # What it can do isn't known before it answers, and then the choice is made.
        what = "somebody else starts the data plane: say --capture ebpf if it has a --cgroup"
        lacks["dataplane.socket"] = what
    if mode == "ebpf":
        for name, what in lacks.items():
            reader.wrong(name, what)
    if lacks or chosen is None:
        return None, "; ".join(f"{name}: {what}" for name, what in lacks.items())
    folder = Path(reader["ebpf.folder"]) / node
    return Ebpf(chosen, folder, reader["ebpf.pod-max-pending"]), ""


def _own_workload(reader: _Reader) -> choice.OwnWorkload | None:
    """As which metrics are served over HBONE."""
    if not reader["stats.hbone"]:
        return None
    if reader["pods"] is not None and reader["pods"].kind == "self":
        reader.wrong("stats.hbone", "with self: the workload has the agent's namespace already")
    if not reader["pod.service-account"]:
        reader.wrong("stats.hbone", "needs pod.service-account, for the certificate")
    if reader["stats.address"] is None or not reader["stats.address"].port:
        reader.wrong("stats.hbone", "needs a port in stats.address")
    return choice.OwnWorkload(
        reader["pod.namespace"], reader["pod.name"], reader["pod.service-account"]
    )


def _ports(reader: _Reader) -> Ports:
    ports = Ports(
        outbound=reader["ports.outbound"],
        inbound_plaintext=reader["ports.inbound-plaintext"],
        inbound_hbone=reader["ports.inbound-hbone"],
        socks5=reader["socks5.port"],
        dns=reader["ports.dns"],
    )
    taken = [ports.outbound, ports.inbound_plaintext, ports.inbound_hbone, ports.dns]
    if len(set(taken)) < len(taken):
        reader.mistakes.append(
            "ports: outbound, inbound-plaintext, inbound-hbone and dns must differ"
        )
    if ports.socks5 in taken:
        reader.wrong("socks5.port", f"{ports.socks5} is one of ports.* already")
    return ports


def _node(reader: _Reader) -> Node:
    name = reader["node"]
    if name is None:
        name = socket.gethostname().lower()
        if not reader.given("node"):
            try:
                values.node_name(name)
            except Mistake:
                reader.wrong("node", f"this host's name {name!r} can't be used; name the node")
    return Node(
        name,
        reader["network"],
        reader["cluster-id"],
        reader["trust-domain"],
        pod_name=reader["pod.name"],
        pod_namespace=reader["pod.namespace"],
        service_account=reader["pod.service-account"],
        address=reader["pod.address"],
    )


def _source(reader: _Reader) -> Source:
    address, file = reader["xds.address"], reader["xds.file"]
    if reader.given("xds.address") and reader.given("xds.file"):
        reader.wrong("xds.file", "either a control plane (xds.address) or a file, not both")
    elif not reader.given("xds.address") and not reader.given("xds.file"):
        reader.wrong("xds.address", "a control plane is needed, or xds.file for a local file")
    if address is None:
        # A file holds everything: there is nobody to ask for more.
        return Source(file=file)
    root = reader["xds.root"]
    if root is None and not reader.given("xds.root"):
        reader.wrong(
            "xds.root", "root certificates for xds.address are needed: path, PEM or SYSTEM"
        )
    return Source(
        control_plane=ControlPlane(
            address,
            root or "",
            reader["xds.token"],
            reader["xds.alt-hostname"],
            reader["xds.headers"],
        ),
        on_demand=reader["xds.on-demand"],
        metadata=reader["xds.metadata"],
    )


def _authority(reader: _Reader) -> Authority | None:
    """Every part that isn't given is taken from `xds`, which usually serves both."""
    if reader.given("ca.spire-socket"):
        return None

    def pick(name: str) -> Any:
        return reader[f"ca.{name}"] if reader.given(f"ca.{name}") else reader[f"xds.{name}"]

    address = pick("address")
    if address is None:
        return None
    if pick("root") is None and reader.given("ca.address") and not reader.given("ca.root"):
        reader.wrong("ca.root", "root certificates for ca.address are needed: path, PEM or SYSTEM")
    endpoint = ControlPlane(
        address, pick("root") or "", pick("token"), pick("alt-hostname"), pick("headers")
    )
    return Authority(endpoint, reader["ca.ttl"])


def _spire(reader: _Reader) -> Spire | None:
    if not reader.given("ca.spire-socket"):
        return None
    for name in _OF_CA:
        if reader.given(name):
            reader.wrong(name, "certificates come from SPIRE (ca.spire-socket), not from a CA")
    found: Path | None = reader["ca.spire-socket"]
    return None if found is None else Spire(found)


def _dataplane(reader: _Reader, node: str) -> DataplaneProcess:
    given = reader["dataplane.socket"]
    if given is not None:
        # An image may name its binary in the environment for all uses; a flag beside it is meant.
        if reader.kind("dataplane.bin") == reader.kind("dataplane.socket"):
            reader.wrong("dataplane.bin", "either a socket or a binary to start, not both")
        return DataplaneProcess(
            socket=given,
            prover=_found_binary(reader),
            drain_deadline=reader["dataplane.drain-deadline"],
        )
    binary = _binary(reader)
    return DataplaneProcess(
        binary=binary,
        prover=binary,
        workers=reader["dataplane.workers"],
        cgroup_parent=_cgroup_parent(reader, node),
        drain_deadline=reader["dataplane.drain-deadline"],
    )


def _binary(reader: _Reader) -> Path | None:
    if reader.given("dataplane.bin"):
        named: Path | None = reader["dataplane.bin"]
        if named is not None and not os.access(named, os.X_OK):
            reader.wrong("dataplane.bin", f"{named}: no such program")
        return named
    found = _found_binary(reader)
    if found is None:
        reader.wrong(
            "dataplane.bin", f"{BINARY} is neither beside {sys.executable} nor in PATH; name it"
        )
    return found


def _found_binary(reader: _Reader) -> Path | None:
    if reader.given("dataplane.bin"):
        named: Path | None = reader["dataplane.bin"]
        return named
    beside = Path(sys.executable).parent / BINARY
    if os.access(beside, os.X_OK):
        return beside
    found = shutil.which(BINARY, path=reader.environ.get("PATH"))
    return None if found is None else Path(found)


def _cgroup_parent(reader: _Reader, node: str) -> Path | None:
    wanted = reader["dataplane.cgroup-parent"]
    if wanted == "none":
        return None
    mount = cgroup2_mount()
    if wanted == "auto":
        if mount is None:
            reader.warnings.append(
                "no cgroup2 is mounted: only its mark exempts the data plane from capture, which "
                "any process with NET_RAW can set; mount cgroup2 or say cgroup-parent none"
            )
            return None
        return mount / "underpass" / node
    chosen = Path(wanted)
    if mount is None or not chosen.is_relative_to(mount) or chosen == mount:
        reader.wrong(
            "dataplane.cgroup-parent",
            f"{chosen}: must lie below the cgroup2 mount {mount or '(none is mounted)'}",
        )
    return chosen


def _named_cgroup(reader: _Reader, name: str, mode: str) -> Path | None:
    """It needn't be there yet: a kubelet may start later."""
    chosen: Path | None = reader[name]
    if chosen is None:
        return None
    mount = cgroup2_mount()
    if mount is None or not chosen.is_relative_to(mount) or chosen == mount:
        reader.wrong(
            name, f"{chosen}: must lie below the cgroup2 mount {mount or '(none is mounted)'}"
        )
    if mode in ("external", "none"):
        reader.warnings.append(f"{name}: only capture by eBPF uses it, not {mode}")
    return chosen


def cgroup2_mount(table: Callable[[], str] = Path("/proc/self/mounts").read_text) -> Path | None:
    """/sys/fs/cgroup on most hosts, /sys/fs/cgroup/unified on hybrid ones."""
    for line in table().splitlines():
        columns = line.split(" ")
        if len(columns) > 2 and columns[2] == "cgroup2":
            return Path(columns[1].replace("\\040", " "))
    return None


def _shown(raw: object) -> str:
    text = str(raw)
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
