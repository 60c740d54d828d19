"""Flags, environment and file become slices; every mistake is told at once, with its place."""

import contextlib
import dataclasses
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config, parts, values
from agent.errors import ConfigErrors, Mistake
from agent.namespaces import NamespaceRules
from agent.pods.choice import OwnWorkload, PodSourceChoice
from agent.settings import SETTINGS
from agent.values import Listen
from proto.gen import control_pb2

ENOUGH = {
    "node": "n1",
    "pods": "file:/etc/pods.yaml",
    "xds_address": "https://cp:15012",
    "xds_root": "/etc/root.pem",
    "dataplane_bin": sys.executable,
    "dataplane_cgroup_parent": "none",
}


def load(
    environ: dict[str, str] | None = None, file: Path | None = None, **options: object
) -> config.Config:
    return config.load(ENOUGH | options, environ or {}, file)


def mistakes(
    environ: dict[str, str] | None = None, file: Path | None = None, **options: object
) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load(environ, file, **options)
    return caught.value.mistakes


def test_defaults_are_those_of_the_facts() -> None:
    loaded = load()
    assert loaded.servers.stats == Listen("", 15020)
    assert loaded.servers.ready == Listen("", 15021)
    assert (loaded.capture.ports.outbound, loaded.capture.ports.inbound_hbone) == (15001, 15008)
    assert loaded.dataplane.drain_deadline == timedelta(seconds=5)
    assert loaded.node.trust_domain == "cluster.local"
    assert loaded.paths.admin_socket == Path("/run/underpass/n1/admin.sock")


def test_flag_wins_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("network: from-file\ncluster-id: from-file\ntrust_domain: from-file\n")
    environ = {"UNDERPASS_NETWORK": "from-env", "UNDERPASS_CLUSTER_ID": "from-env"}
    loaded = load(environ, file, network="from-flag")
    assert loaded.node.network == "from-flag"
    assert loaded.node.cluster_id == "from-env"
    assert loaded.node.trust_domain == "from-file"


def test_all_mistakes_of_all_places_come_together(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("limits: {connect-timeout: 5}\nxds: {adress: x}\nstats: {address: 15020}\n")
    found = mistakes(
        {"UNDERPASS_XDS_ADDRESS": "http://cp", "UNDERPASS_IPV6": "maybe"},
        file,
        xds_address=None,
        node="Not_A_Node",
        pods="cri:/x",
        ports_outbound="70000",
    )
    text = "\n".join(found)
    for place in (
        f"{file}: limits.connect-timeout: '5': not a duration",
        f"{file}: xds.adress: unknown setting",
        f"{file}: stats.address: '15020': not an address",
        "UNDERPASS_XDS_ADDRESS: 'http://cp': only https",
        "UNDERPASS_IPV6: 'maybe': write true or false",
        "--node: 'Not_A_Node': not a node name",
        "--pods: 'cri:/x': unknown pod source 'cri'",
        "--ports-outbound: '70000': must be from 1 to 65535",
    ):
        assert place in text
    assert len(found) == 8


def test_without_anything_the_needed_settings_are_named() -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.load({}, {"PATH": "/nowhere"}, None)
    text = "\n".join(caught.value.mistakes)
    assert "pods (--pods, UNDERPASS_PODS): is needed" in text
    assert "xds.address (--xds-address, UNDERPASS_XDS_ADDRESS): a control plane is needed" in text


def test_control_plane_and_local_file_exclude_each_other() -> None:
    assert ["either a control plane" in text for text in mistakes(xds_file="/x.yaml")] == [True]


def test_local_file_alone_needs_no_control_plane_and_has_no_authority() -> None:
    loaded = load(xds_address=None, xds_root=None, xds_file="/x.yaml")
    assert loaded.source.file == Path("/x.yaml")
    assert loaded.authority is None


def test_authority_is_the_control_plane_unless_told_otherwise() -> None:
    loaded = load(xds_token="/token", ca_address="ca:443")
    assert loaded.authority is not None
    assert loaded.authority.endpoint.address == "ca:443"
    assert loaded.authority.endpoint.root == "/etc/root.pem"
    assert loaded.authority.endpoint.token == Path("/token")


def test_certificates_come_from_spire_or_from_a_ca() -> None:
    loaded = load({"UNDERPASS_CA_SPIRE_SOCKET": "/run/spire/admin.sock"})
    assert loaded.spire is not None
    assert loaded.spire.socket == Path("/run/spire/admin.sock")
    assert loaded.authority is None
    assert load().spire is None
    found = mistakes(
        {"UNDERPASS_CA_TTL": "1h"}, ca_spire_socket="/s", ca_address="ca:443", node="A"
    )
    assert [text.partition(":")[0] for text in found] == [
        "--node",
        "--ca-address",
        "UNDERPASS_CA_TTL",
    ]
    assert all("SPIRE (ca.spire-socket), not from a CA" in text for text in found[1:])
    assert "too long" in mistakes(ca_spire_socket=f"/{'s' * 108}")[0]


def test_spire_wins_over_the_ca_of_upstreams_environment() -> None:
    upstream = {"PROXY_MODE": "shared", "CA_ADDRESS": "https://ca:1", "SECRET_TTL": "1h"}
    loaded = load(upstream, ca_spire_socket="/run/spire/admin.sock")
    assert loaded.spire is not None
    assert loaded.authority is None


def test_given_socket_needs_no_binary() -> None:
    loaded = load(dataplane_bin=None, dataplane_socket="/run/dp.sock")
    assert loaded.dataplane.socket == Path("/run/dp.sock")
    assert loaded.dataplane.binary is None


def test_given_socket_wins_over_a_binary_of_the_environment_but_not_over_a_flag() -> None:
    environ = {"UNDERPASS_DATAPLANE_BIN": "/some/where"}
    loaded = load(environ, dataplane_bin=None, dataplane_socket="/run/dp.sock")
    assert (loaded.dataplane.socket, loaded.dataplane.binary) == (Path("/run/dp.sock"), None)
    (found,) = mistakes(dataplane_socket="/run/dp.sock")
    assert found.startswith("--dataplane-bin: either a socket or a binary")


def test_binary_that_is_none_is_a_mistake() -> None:
    assert mistakes(dataplane_bin="/nonexistent/dp") == [
        "--dataplane-bin: /nonexistent/dp: no such program"
    ]


def test_run_dir_too_long_for_a_socket_is_told_before_bind_fails() -> None:
    (found,) = mistakes(run_dir="/" + "x" * 100)
    assert found.startswith("--run-dir: too long by")


def test_unreadable_and_unparsable_files_are_mistakes(tmp_path: Path) -> None:
    assert mistakes(file=tmp_path / "absent.yaml")[0].endswith("No such file or directory")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    assert "not YAML" in mistakes(file=broken)[0]
    broken.write_text("- a")
    assert "a mapping of settings is wanted" in mistakes(file=broken)[0]


def test_foreign_environment_is_only_a_warning() -> None:
    loaded = load({"UNDERPASS_SERVICE_HOST": "10.0.0.1"})
    assert any("UNDERPASS_SERVICE_HOST" in text for text in loaded.warnings)


def test_cgroup2_is_found_in_the_mount_table_wherever_it_is() -> None:
    table = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    assert config.cgroup2_mount(lambda: table) == Path("/sys/fs/cgroup/unified")
    assert config.cgroup2_mount(lambda: "proc /proc proc rw 0 0\n") is None


@pytest.mark.parametrize("name", ["pods-cgroup", "kubelet-cgroup"])
def test_cgroups_of_others_lie_below_the_mount(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mount, option = Path("/sys/fs/cgroup"), name.replace("-", "_")
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    by_ebpf: dict[str, Any] = {"capture": "ebpf", "dataplane_cgroup_parent": None}

    def given(path: str) -> dict[str, Any]:
        return {option: path}

    monkeypatch.setattr(config, "cgroup2_mount", lambda: mount)
    found = load(**by_ebpf, **given("/sys/fs/cgroup/some.slice")).capture
    assert found.ebpf is not None
    chosen = found.ebpf.pods_cgroup if name == "pods-cgroup" else found.kubelet_cgroup
    assert chosen == mount / "some.slice"
    by_default = load(**by_ebpf).capture
    assert by_default.kubelet_cgroup is None
    assert by_default.ebpf is not None
    assert by_default.ebpf.pods_cgroup == mount / "kubepods.slice"
    assert load(**(by_ebpf | {"capture": "nftables"})).capture.ebpf == by_default.ebpf
    assert load(capture="none").capture.ebpf is None
    (warning,) = load(capture="none", **given("/sys/fs/cgroup/x")).warnings
    assert warning == f"{name}: only capture by eBPF uses it, not none"
    for wrong, why in (
        ("kubepods", "not an absolute path"),
        ("/sys/fs/cgroup/../etc", "not an absolute path"),
        ("/sys/fs/cgroup", "must lie below the cgroup2 mount /sys/fs/cgroup"),
        ("/var/kubepods", "must lie below the cgroup2 mount /sys/fs/cgroup"),
    ):
        (mistake,) = mistakes(**given(wrong))
        assert why in mistake


def test_the_kubelets_cgroup_is_not_above_the_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cgroup2_mount", lambda: Path("/sys/fs/cgroup"))
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    pods = "/sys/fs/cgroup/all.slice/pods"
    for kubelet in (pods, "/sys/fs/cgroup/all.slice"):
        (mistake,) = mistakes(
            capture="ebpf",
            dataplane_cgroup_parent=None,
            pods_cgroup=pods,
            kubelet_cgroup=kubelet,
        )
        assert f"kubelet-cgroup: {kubelet}: the pods are in it, too ({pods})" in mistake


def test_ebpf_needs_a_cgroup_of_all_pods_and_one_of_the_data_plane(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "cgroup2_mount", lambda: tmp_path)
    (mistake,) = mistakes(capture="ebpf", dataplane_cgroup_parent=None)
    assert "pods-cgroup" in mistake
    assert f"no kubepods below {tmp_path}: name the cgroup above all" in mistake
    (tmp_path / "kubepods").mkdir()
    (mistake,) = mistakes(capture="ebpf", dataplane_cgroup_parent="none")
    assert "ebpf needs a cgroup of the data plane" in mistake
    monkeypatch.setattr(config, "cgroup2_mount", lambda: None)
    (mistake,) = mistakes(capture="ebpf", dataplane_cgroup_parent=None)
    assert "ebpf needs cgroup2: mount it, or choose nftables" in mistake


def test_auto_says_what_ebpf_lacks_instead_of_failing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "cgroup2_mount", lambda: tmp_path)
    capture = load(dataplane_cgroup_parent=None).capture
    assert (capture.mode, capture.ebpf) == ("auto", None)
    assert f"no kubepods below {tmp_path}" in capture.no_ebpf
    (tmp_path / "kubepods").mkdir()
    assert (
        "needs a cgroup of the data plane" in load(dataplane_cgroup_parent="none").capture.no_ebpf
    )
    given = load(dataplane_bin=None, dataplane_cgroup_parent=None, dataplane_socket="/run/dp.sock")
    assert "somebody else starts the data plane" in given.capture.no_ebpf
    capture = load(dataplane_cgroup_parent=None).capture
    assert capture.ebpf is not None
    assert (capture.ebpf.pods_cgroup, capture.no_ebpf) == (tmp_path / "kubepods", "")
    monkeypatch.setattr(config, "cgroup2_mount", lambda: None)
    assert "mount it" in load(dataplane_cgroup_parent=None).capture.no_ebpf
    by_nftables = load(dataplane_cgroup_parent=None, capture="nftables").capture
    assert by_nftables.ebpf is None
    # A pod may ask for it where the node doesn't.
    assert "mount it" in by_nftables.no_ebpf


def test_cgroup_leaf_lies_below_the_mount_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = Path("/sys/fs/cgroup/unified")
    monkeypatch.setattr(config, "cgroup2_mount", lambda: mount)
    assert load(dataplane_cgroup_parent=None).dataplane.cgroup_parent == mount / "underpass" / "n1"


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("file:/a", PodSourceChoice("file", Path("/a"))),
        ("zds", PodSourceChoice("zds", Path("/var/run/ztunnel/ztunnel.sock"))),
        ("zds:/x.sock", PodSourceChoice("zds", Path("/x.sock"))),
        ("self:ns/vm/acct", PodSourceChoice("self", workload=OwnWorkload("ns", "vm", "acct"))),
    ],
)
def test_pod_sources(raw: str, wanted: PodSourceChoice) -> None:
    assert load(pods=raw).pods == wanted


@pytest.mark.parametrize("raw", ["self", "self:", "self:a/b", "self:a/b/C", "file", "", "cri:x"])
def test_pod_sources_refused(raw: str) -> None:
    (found,) = mistakes(pods=raw)
    assert found.startswith("--pods: ")
    assert "self:NAMESPACE/NAME/ACCOUNT" in found or "write NAMESPACE/NAME/ACCOUNT" in found


def test_redirection_is_left_to_whoever_names_the_pods() -> None:
    assert load(pods="zds").capture.mode == "external"
    assert load(pods="self:a/b/c").capture.mode == "external"
    assert load(pods="self:a/b/c", capture="nftables").capture.mode == "nftables"
    assert load(capture="external").capture.mode == "external"
    (found,) = mistakes(pods="zds", capture="nftables")
    assert found == "--capture: the ZDS server redirects its pods' traffic itself; write external"


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("127.0.0.1:80", Listen("127.0.0.1", 80)),
        ("[::1]:80", Listen("::1", 80)),
        (":0", Listen("", 0)),
        ("off", None),
        (False, None),
    ],
)
def test_listen_addresses(raw: object, wanted: Listen | None) -> None:
    assert values.listen(raw) == wanted


@pytest.mark.parametrize("raw", ["::1:80", "80", "[::1]", "host:", "host:x"])
def test_listen_addresses_refused(raw: str) -> None:
    with pytest.raises(Mistake):
        values.listen(raw)


def test_headers_are_the_same_from_all_three_places(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("xds: {headers: {a: '1', b: '2'}}\n")
    by_file = load(file=file)
    by_env = load({"UNDERPASS_XDS_HEADERS": "a=1,b=2"})
    by_flag = load(xds_headers=("a=1", "b=2"))
    assert by_file.source == by_env.source == by_flag.source


def test_rules_of_namespaces_come_from_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    with_environment = load({"UNDERPASS_NAMESPACES": "shop"}, None)
    assert any("UNDERPASS_NAMESPACES" in text for text in with_environment.warnings)
    file.write_text(
        "namespaces: {shop: {registryOnly: on, waypointRequired: dry-run}, bank: {},"
        " old: {cutPrecapture: true}, quiet: {udp: deny}, loud: {udp: allow}}"
    )
    assert load(file=file).namespaces == {
        "shop": NamespaceRules("on", "dry-run"),
        "bank": NamespaceRules("off", "off"),
        "old": NamespaceRules(cut_precapture=True),
        "quiet": NamespaceRules(udp_deny=True),
        "loud": NamespaceRules(),
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{shop: {udp: on}}", "shop: udp: True is unknown; write allow or deny"),
        ("{shop: {sameNode: relay}}", "shop: sameNode: comes with a later release"),
        ("{shop: {registryonly: on}}", "shop: registryonly: unknown; known are registryOnly"),
        ("{shop: {registryOnly: maybe}}", "'maybe' is unknown; write off, dry-run or on"),
        ("{shop: {registryOnly: [on]}}", "[True] is unknown; write off, dry-run or on"),
        ("{shop: {cutPrecapture: soon}}", "cutPrecapture: 'soon' is unknown; write true or false"),
        ("{shop: on}", "shop: a mapping is wanted"),
        ("[shop]", "a mapping is wanted: NAME:"),
        ("{Shop: {}}", "Shop: not a namespace"),
    ],
)
def test_mistakes_in_rules_of_namespaces_name_namespace_and_key(
    tmp_path: Path, text: str, what: str
) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(f"namespaces: {text}")
    (found,) = mistakes(file=file)
    assert found.startswith(f"{file}: namespaces: ")
    assert what in found


def test_what_upstream_lets_one_tune_reaches_the_data_plane() -> None:
    message = parts.instance_config(
        load(
            original_source="must",
            kubelet_probe_fallback="on",
            localhost_app_tunnel="off",
            response_baggage="off",
            xds_on_demand="on",
            socks5_port="15080",
            http2_frame_size="16384",
            keepalive_time="5s",
            keepalive_user_timeout="on",
            limits_preface_timeout="1500ms",
            limits_pod_max_handshakes="7",
        )
    )
    assert message.original_source == control_pb2.ORIGINAL_SOURCE_MUST
    assert message.localhost_app_tunnel_off
    assert message.kubelet_probe_fallback
    assert not parts.instance_config(load()).kubelet_probe_fallback
    assert message.response_baggage_off
    assert message.on_demand
    assert message.socks5_port == 15080
    assert (message.http2.frame_size, message.http2.stream_window) == (16384, 4 << 20)
    assert (message.keepalive.time_s, message.keepalive.interval_s) == (5, 180)
    assert message.keepalive.user_timeout
    assert (message.limits.preface_timeout_ms, message.limits.pod_max_handshakes) == (1500, 7)


def test_dns_is_on_and_its_settings_reach_the_data_plane() -> None:
    default = load()
    assert parts.dns_rules(default).capture
    assert parts.capture_config(default).ports.dns == 15053
    off = load(dns_capture="off")
    assert not parts.dns_rules(off).capture
    assert parts.capture_config(off).ports.dns is None
    config = load(
        dns_cluster_domain="Corp.Example.",
        dns_nameservers="10.0.0.1, [fd00::1]:5353,fd00::2",
        dns_preferred_namespace="infra",
        dns_forward_timeout="2s",
    )
    message = parts.instance_config(config)
    assert message.dns.cluster_domain == "corp.example"
    assert list(message.dns.nameservers) == ["10.0.0.1", "[fd00::1]:5353", "fd00::2"]
    assert (message.dns.preferred_namespace, message.dns.forward_timeout_ms) == ("infra", 2000)
    assert message.dns_port == 15053


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dns_nameservers": "dns.example"}, "no address"),
        ({"dns_nameservers": "10.0.0.1:99999"}, "must be from 1"),
        ({"dns_nameservers": "127.0.0.53"}, "can't be asked from a pod"),
        ({"dns_cluster_domain": "a b"}, "not a domain"),
        ({"ports_dns": "15001"}, "must differ"),
    ],
)
def test_mistakes_of_dns_settings_are_told(options: dict[str, Any], words: str) -> None:
    assert words in mistakes(**options)[0]


def test_socks5_is_off_and_never_a_port_of_another_listener() -> None:
    assert parts.instance_config(load()).socks5_port == 0
    assert parts.instance_config(load(socks5_port="off")).socks5_port == 0
    assert mistakes(socks5_port="15008") == ["--socks5-port: 15008 is one of ports.* already"]


def test_names_of_settings_are_unique_in_every_place() -> None:
    for names in (
        [setting.option for setting in SETTINGS],
        [setting.env for setting in SETTINGS],
    ):
        assert len(names) == len(set(names))


def test_slices_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().node.name = "other"  # type: ignore[misc]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            setting.env: st.text(st.characters(exclude_characters="\x00"), max_size=20)
            for setting in SETTINGS
        },
    )
)
def test_no_environment_does_worse_than_mistakes(environ: dict[str, str]) -> None:
    # `pods` is missing in most cases, so a value that loads is the exception, never a traceback.
    with contextlib.suppress(ConfigErrors):
        config.load({}, environ | {"PATH": os.defpath}, None)


def test_metrics_over_hbone_need_a_workload_to_be() -> None:
    loaded = load(stats_hbone="true", pod_name="agent", pod_service_account="agent-sa")
    assert loaded.servers.hbone == OwnWorkload("istio-system", "agent", "agent-sa")
    assert load(pod_service_account="agent-sa").servers.hbone is None
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "needs pod.service-account"),
        ({"pod_service_account": "a", "stats_address": "off"}, "needs a port"),
        ({"pod_service_account": "a", "pods": "self:ns/name/account"}, "with self:"),
    )
    for options, words in cases:
        (mistake,) = mistakes(stats_hbone="true", **options)
        assert words in mistake


def test_log_and_telemetry_reach_the_data_plane(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(
        "log: {omit-fields: [src.addr, bytes_sent], sample: 10, queue: 500}\n"
        "telemetry: {otlp-endpoint: http://otel:4317/, series-ttl: 1m, istio-version: '1.30'}\n"
    )
    loaded = load({"UNDERPASS_LOG_POLICY_DECISIONS": "on"}, file)
    sent = parts.instance_config(loaded)
    assert list(sent.log.omit_fields) == ["src.addr", "bytes_sent"]
    assert (sent.log.sample_one_in, sent.log.queue_lines) == (10, 500)
    assert sent.log.policy_decisions
    assert sent.telemetry.otlp_endpoint == "http://otel:4317"
    assert (sent.telemetry.series_ttl_ms, sent.telemetry.istio_version) == (60_000, "1.30")


def test_bad_log_and_telemetry_settings_say_what_would_be_right() -> None:
    found = mistakes(log_omit_fields="src.adr", telemetry_otlp_endpoint="https://otel:4317")
    text = "\n".join(found)
    assert "--log-omit-fields: 'src.adr': 'src.adr' is no access log field; there are src" in text
    assert "--telemetry-otlp-endpoint: 'https://otel:4317': not an address; write http:" in text
