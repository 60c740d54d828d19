"""Upstream's environment becomes our settings: same meaning, below our own words."""

import asyncio
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from agent import config, dropin, parts
from agent.admin.dump import config_view, own_section
from agent.dropin import values
from agent.dropin.rows import ROWS
from agent.errors import ConfigErrors, Mistake
from agent.pods.choice import ZDS_SOCKET
from agent.settings import SETTINGS
from agent.slices import Authority, ControlPlane
from agent.values import Listen
from agent.xds.endpoint import Endpoint
from agent.xds.local import LocalFile
from agent.xds.types import ADDRESS
from tests.support.eventually import eventually
from tests.support.targets import RecordingDataplane

ROOT = Path(__file__).resolve().parents[3]
# What the DaemonSet of upstream's chart sets.
CHART = {
    "CA_ADDRESS": "istiod.istio-system.svc:15012",
    "XDS_ADDRESS": "istiod.istio-system.svc:15012",
    "RUST_LOG": "info",
    "RUST_BACKTRACE": "1",
    "ISTIO_META_CLUSTER_ID": "Kubernetes-7",
    "INPOD_ENABLED": "true",
    "TERMINATION_GRACE_PERIOD_SECONDS": "30",
    "POD_NAME": "ztunnel-abcde",
    "POD_NAMESPACE": "istio-system",
    "NODE_NAME": "worker-1",
    "INSTANCE_IP": "10.0.0.7",
    "SERVICE_ACCOUNT": "ztunnel",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative paths mean the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(environ: dict[str, str], **options: object) -> config.Config:
    own = {"dataplane_bin": sys.executable, "dataplane_cgroup_parent": "none"}
    return config.load(own | options, environ, None)


def mistakes(environ: dict[str, str], **options: object) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load(environ, **options)
    return caught.value.mistakes


def test_the_charts_environment_is_enough_to_start(folder: Path) -> None:
    token = folder / "var/run/secrets/tokens/istio-token"
    token.parent.mkdir(parents=True)
    token.write_text("t")
    loaded = load(CHART)
    assert (loaded.pods.kind, loaded.pods.path) == ("zds", ZDS_SOCKET)
    assert loaded.capture.mode == "external"
    plane = loaded.source.control_plane
    assert plane is not None
    assert plane.address == "istiod.istio-system.svc:15012"
    assert plane.root == str(folder / "var/run/secrets/istio/root-cert.pem")
    assert plane.token == token
    assert loaded.authority is not None
    assert loaded.authority.endpoint == plane
    assert (loaded.node.name, loaded.node.cluster_id) == ("worker-1", "Kubernetes-7")
    assert (loaded.node.pod_name, loaded.node.address) == ("ztunnel-abcde", "10.0.0.7")
    assert loaded.node.service_account == "ztunnel"
    assert str(loaded.servers.hbone) == "istio-system/ztunnel-abcde/ztunnel"
    assert loaded.dataplane.drain_deadline == timedelta(seconds=25)
    assert loaded.servers.admin == Listen("localhost", 15000)
    assert loaded.warnings == ()


def test_without_a_name_that_means_upstreams_proxy_nothing_is_read() -> None:
    translated = dropin.translate({"RUST_LOG": "trace", "NETWORK": "n"}, lambda _: True)
    assert translated == dropin.Translated()


def test_our_own_words_win() -> None:
    loaded = load(
        CHART | {"UNDERPASS_CLUSTER_ID": "ours", "NETWORK": "theirs"},
        xds_file="/mesh.yaml",
        pods="file:/pods.yaml",
        node="n1",
    )
    assert loaded.source.file == Path("/mesh.yaml")
    assert (loaded.node.name, loaded.node.cluster_id, loaded.node.network) == (
        "n1",
        "ours",
        "theirs",
    )
    assert loaded.pods.kind == "file"


def test_addresses_default_to_istiod_in_and_outside_a_cluster() -> None:
    inside = load({"PROXY_MODE": "shared", "KUBERNETES_SERVICE_HOST": "1"}, node="n").source
    assert inside.control_plane is not None
    assert inside.control_plane.address == "https://istiod.istio-system.svc:15012"
    outside = load({"PROXY_MODE": "shared"}, node="n").source
    assert outside.control_plane is not None
    assert outside.control_plane.address == "https://localhost:15012"


def test_dedicated_mode_is_one_workload_here_and_asks_for_its_own_identity() -> None:
    loaded = load({"PROXY_MODE": "dedicated", "PROXY_WORKLOAD_INFO": "ns/vm/acct"}, node="n")
    assert str(loaded.pods.workload) == "ns/vm/acct"
    manager = parts.identities(loaded)
    assert manager is not None
    assert mistakes({"PROXY_MODE": "dedicated"}, node="n") == [
        "PROXY_WORKLOAD_INFO: 'self:': names no workload; write file:PATH, zds[:PATH] or "
        "self:NAMESPACE/NAME/ACCOUNT"
    ]


def test_mesh_file_is_below_proxy_config_and_that_below_single_names(folder: Path) -> None:
    mesh = folder / "etc/istio/config/mesh"
    mesh.parent.mkdir(parents=True)
    mesh.write_text(
        "defaultConfig:\n"
        "  discoveryAddress: from-mesh:1\n"
        "  statsPort: 1111\n"
        "  concurrency: 3\n"
        "  proxyMetadata: {ISTIO_META_A: mesh, B: mesh, C: mesh}\n"
    )
    environ = {
        "PROXY_CONFIG": "{discoveryAddress: from-config:1, proxyAdminPort: 2222, "
        "proxyMetadata: {B: config, C: config}}",
        "CA_ADDRESS": "from-name:1",
        "ISTIO_META_C": "name",
        "ISTIO_METAJSON_D": '{"e": [1]}',
        "ISTIO_METAJSON_BAD": "{",
    }
    loaded = load(environ, node="n")
    assert loaded.source.control_plane is not None
    assert loaded.source.control_plane.address == "from-config:1"
    assert loaded.authority is not None
    assert loaded.authority.endpoint.address == "from-name:1"
    assert loaded.servers.stats == Listen("", 1111)
    assert loaded.servers.admin == Listen("localhost", 2222)
    assert loaded.dataplane.workers == 3
    metadata = loaded.source.metadata
    assert metadata == {"A": "mesh", "B": "config", "C": "name", "D": {"e": [1]}}
    assert any("ISTIO_METAJSON_BAD: ignored: not JSON" in text for text in loaded.warnings)


def test_each_knob_has_its_upstream_meaning() -> None:
    loaded = load(
        CHART
        | {
            "ENABLE_ORIG_SRC": "true",
            "LOCALHOST_APP_TUNNEL": "false",
            "ENABLE_RESPONSE_BAGGAGE": "false",
            "IPV6_ENABLED": "false",
            "UNSTABLE_ENABLE_SOCKS5": "true",
            "XDS_ON_DEMAND": "true",
            "SECRET_TTL": "1h",
            "XDS_HEADER_X_A": "1",
            "CA_HEADER_X_B": "2",
            "PACKET_MARK": "1338",
            "POOL_MAX_STREAMS_PER_CONNECTION": "7",
            "POOL_UNUSED_RELEASE_TIMEOUT": "1m",
            "HTTP2_STREAM_WINDOW_SIZE": "70000",
            "HTTP2_CONNECTION_WINDOW_SIZE": "80000",
            "HTTP2_FRAME_SIZE": "20000",
            "KEEPALIVE_TIME": "11s",
            "KEEPALIVE_INTERVAL": "12s",
            "KEEPALIVE_RETRIES": "13",
            "USER_TIMEOUT_ENABLED": "true",
            "LOG_FORMAT": "json",
            "RUST_LOG": "warn,ztunnel::proxy=debug",
            "INPOD_UDS": "/other.sock",
            "CONNECTION_TERMINATION_DEADLINE": "9s",
            "ISTIO_META_DNS_CAPTURE": "false",
            "ISTIO_META_DNS_PROXY_ADDR": "localhost:15054",
            "CLUSTER_DOMAIN": "example.org",
            "PREFERED_SERVICE_NAMESPACE": "shop",
            "CRL_PATH": "/crl.pem",
            "COMPLIANCE_POLICY": "pqc",
            "AUTHZ_POLICY_INFO_LOGGING": "true",
            "ISTIO_META_ISTIO_VERSION": "1.30",
        }
    )
    wire, limits = loaded.wire, loaded.limits
    assert (wire.original_source, wire.localhost_app_tunnel) == ("must", False)
    assert not wire.response_baggage
    assert not loaded.capture.ipv6
    assert loaded.capture.ports.socks5 == 15080
    assert loaded.source.on_demand
    assert loaded.authority is not None
    assert loaded.authority.ttl == timedelta(hours=1)
    assert loaded.authority.endpoint.headers == {"X_B": "2"}
    assert loaded.source.control_plane is not None
    assert loaded.source.control_plane.headers == {"X_A": "1"}
    assert parts.instance_config(loaded).mark == parts.capture_config(loaded).mark == 1338
    assert (limits.pool_max_streams, limits.pool_idle) == (7, timedelta(minutes=1))
    assert (wire.http2.stream_window, wire.http2.connection_window) == (70_000, 80_000)
    assert wire.http2.frame_size == 20_000
    assert (wire.keepalive.time, wire.keepalive.interval) == (
        timedelta(seconds=11),
        timedelta(seconds=12),
    )
    assert (wire.keepalive.retries, wire.keepalive.user_timeout) == (13, True)
    assert (loaded.log.format, loaded.log.filter) == ("json", "warn,underpass::proxy=debug")
    assert loaded.pods.path == Path("/other.sock")
    assert (loaded.dns.capture, loaded.capture.ports.dns) == (False, 15054)
    assert (loaded.dns.cluster_domain, loaded.dns.preferred_namespace) == ("example.org", "shop")
    assert (loaded.trust.crl, loaded.trust.compliance_policy) == (Path("/crl.pem"), "pqc")
    assert parts.instance_config(loaded).telemetry.istio_version == "1.30"
    assert parts.instance_config(loaded).log.policy_decisions
    assert not [text for text in loaded.warnings if "later release" in text]
    assert loaded.dataplane.drain_deadline == timedelta(seconds=9)


def test_ignored_names_warn_with_the_reason() -> None:
    warnings = load(CHART | {"INPOD_PORT_REUSE": "true", "TLS12_ENABLED": "true"}).warnings
    assert "INPOD_PORT_REUSE: ignored: listeners never share their ports" in "\n".join(warnings)
    assert "TLS12_ENABLED: ignored: peers speak TLS 1.3 alone" in warnings


def test_bad_values_are_told_together_with_ours_and_with_their_names() -> None:
    found = mistakes(
        CHART
        | {
            "PROXY_MODE": "both",
            "KEEPALIVE_TIME": "soon",
            "ZTUNNEL_WORKER_THREADS": "many",
            "TERMINATION_GRACE_PERIOD_SECONDS": "-1",
            "AUTH_TOKEN": "s3cr3t two",
            "LOG_FORMAT": "xml",
            "FAKE_CA": "true",
            "ENABLE_PROXY": "false",
            "LOCAL_XDS": "workloads: []",
            "LOCAL_XDS_PATH": "/mesh.yaml",
            "PROXY_CONFIG": "[",
            "XDS_ADDRESS": "http://istiod:15010",
            "NODE_NAME": "Not_A_Node",
        },
        log_access="maybe",
        pods="file:/pods",
    )
    text = "\n".join(found)
    for place in (
        "PROXY_MODE: 'both': write shared or dedicated",
        "KEEPALIVE_TIME: 'soon': not a duration",
        "ZTUNNEL_WORKER_THREADS: write a number",
        "TERMINATION_GRACE_PERIOD_SECONDS: must not be negative",
        "AUTH_TOKEN: neither a file nor a token",
        "LOG_FORMAT: write plain or json",
        "FAKE_CA: only upstream's test builds",
        "ENABLE_PROXY: there is no agent without its proxy",
        "LOCAL_XDS: either it or LOCAL_XDS_PATH, not both",
        "PROXY_CONFIG: not YAML",
        "XDS_ADDRESS: 'http://istiod:15010': only https",
        "NODE_NAME: 'Not_A_Node': not a node name",
        "--log-access: 'maybe': write true or false",
    ):
        assert place in text
    # The address and the file exclude each other, too.
    assert len(found) == 14
    assert "s3cr3t" not in text


@pytest.mark.parametrize(
    ("grace", "wanted"), [("0", "1s"), ("1", "1s"), ("5", "4s"), ("10", "9s"), ("11", "6s")]
)
def test_grace_period_becomes_a_deadline_that_ends_before_it(grace: str, wanted: str) -> None:
    found = values.drain_deadline({"TERMINATION_GRACE_PERIOD_SECONDS": grace})
    assert found == ("TERMINATION_GRACE_PERIOD_SECONDS", wanted)


@pytest.mark.parametrize(
    ("environ", "concurrency", "wanted"),
    [
        ({"ZTUNNEL_WORKER_THREADS": "6"}, 3, 6),
        ({"ZTUNNEL_CPU_LIMIT": "8", "ZTUNNEL_WORKER_THREADS": "30%"}, None, 3),
        ({"ZTUNNEL_CPU_LIMIT": "8", "ZTUNNEL_WORKER_THREADS": "0"}, None, 8),
        ({"ZTUNNEL_CPU_LIMIT": "8"}, 0, 8),
        ({}, 3, 3),
        ({"ZTUNNEL_RESOURCE_CPU_LIMIT": "1500m"}, None, 2),
        ({"ZTUNNEL_RESOURCE_CPU_LIMIT": "1", "ZTUNNEL_RESOURCE_CPU_REQUEST": "3"}, None, 3),
        ({"ZTUNNEL_CPU_LIMIT": "16", "ZTUNNEL_RESOURCE_CPU_REQUEST": "100m"}, None, 4),
    ],
)
def test_worker_threads(environ: dict[str, str], concurrency: object, wanted: int) -> None:
    found = values.workers(environ, concurrency)
    assert found is not None
    assert found[1] == wanted


@pytest.mark.parametrize("text", ["-1", "101%", "0%", "many", "5%%", "", "1.5"])
def test_worker_threads_refused(text: str) -> None:
    with pytest.raises(Mistake):
        values.threads(text, 4)


def test_without_any_word_on_threads_ours_is_the_default() -> None:
    assert values.workers({}, None) is None


def test_local_file_takes_the_place_of_a_control_plane() -> None:
    loaded = load({"LOCAL_XDS_PATH": "/mesh.yaml", "CA_ADDRESS": "ca:1"}, node="n")
    assert loaded.source.file == Path("/mesh.yaml")
    assert loaded.authority is not None
    assert loaded.authority.endpoint.address == "ca:1"
    assert mistakes({"XDS_ADDRESS": "", "CA_ADDRESS": ""}, node="n")[0].startswith("CA_ADDRESS: is")


async def test_inline_configuration_is_read_like_a_file() -> None:
    text = "workloads: [{uid: u, name: a, namespace: shop, workloadIps: [10.0.0.1]}]"
    loaded = load({"LOCAL_XDS": text, "CA_ADDRESS": "ca:1"}, node="n")
    source = parts.configuration_source(loaded)
    assert isinstance(source, LocalFile)
    target = RecordingDataplane()
    source.attach(target, [])
    running = asyncio.create_task(source.run())
    await eventually(lambda: set(target.held.get(ADDRESS, {})) == {"u"}, what=source.status)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    static = await own_section(loaded, "staticConfig")
    assert [entry["uid"] for entry in static["workloads"]] == ["u"]  # type: ignore[attr-defined]


def test_a_token_itself_is_sent_and_never_shown() -> None:
    loaded = load(CHART | {"AUTH_TOKEN": "s3cr3t"})
    assert isinstance(loaded.authority, Authority)
    for endpoint in (loaded.source.control_plane, loaded.authority.endpoint):
        assert isinstance(endpoint, ControlPlane)
        asked = Endpoint(address="cp:1", root_cert="SYSTEM", token_path=endpoint.token)
        assert ("authorization", "Bearer s3cr3t") in asked.metadata()
    shown = f"{loaded} {loaded!r} {config_view(loaded)} {loaded.source.control_plane}"
    assert "s3cr3t" not in shown
    (mistake,) = mistakes(CHART | {"AUTH_TOKEN": "/var/run/secrets/token"})
    assert mistake == "AUTH_TOKEN: names no file"


def test_the_documented_table_is_that_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/env_table.py", "--check"], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_no_name_is_listed_twice_and_each_has_a_meaning() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    known = {setting.name for setting in SETTINGS}
    for row in ROWS:
        assert row.note or row.setting, row.name
        assert not row.setting or row.setting in known, row.name
