"""A pod's resolv.conf, and what the data plane is told of a pod's DNS."""

import os
from pathlib import Path

import pytest

from agent.pods import resolv_conf
from agent.pods.dns import DnsRules
from agent.pods.netns import NetnsPath
from agent.pods.resolv_conf import ResolvConf, Unreadable, parse, read
from agent.pods.source import Pod
from proto.gen import control_pb2


def pod(conf: Path | None = None, *, capture: bool = True) -> Pod:
    netns = NetnsPath(Path("/run/netns/a"))
    return Pod("u", "a", "shop", "default", netns, dns_capture=capture, resolv_conf=conf)


def told(rules: DnsRules, of: Pod) -> control_pb2.PodSettings:
    settings = control_pb2.PodSettings()
    rules.apply(of, settings)
    return settings


def test_what_kubernetes_writes_is_read_as_libc_would() -> None:
    text = """\
# by the kubelet
search ignored.example
nameserver 10.96.0.10
nameserver fd96::a ; a comment
search shop.svc.cluster.local SVC.cluster.local. cluster.local
options edns0 ndots:5
"""
    search = ("shop.svc.cluster.local", "svc.cluster.local", "cluster.local")
    assert parse(text) == ResolvConf(("10.96.0.10", "fd96::a"), search, 5)


def test_servers_that_a_pod_cannot_ask_are_left_out_and_three_are_enough() -> None:
    useless = ["127.0.0.53", "::1", "::ffff:127.0.0.1", "0.0.0.0", "fe80::1%eth0", "dns.example"]
    good = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
    found = parse("\n".join(f"nameserver {server}" for server in useless + good))
    assert found.nameservers == tuple(good[:3])
    assert parse("nameserver\nsearch\noptions ndots:x") == ResolvConf()


@pytest.mark.parametrize("kind", ["missing", "fifo", "folder", "huge"])
def test_what_is_no_resolv_conf_is_named_and_never_hangs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "resolv.conf"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.write_bytes(b"#" * 70_000)
    with pytest.raises(Unreadable, match=str(path)):
        read(path)


def test_links_in_a_pods_own_tree_do_not_lead_into_the_nodes() -> None:
    # Of this process the root is the machine's, where the file may be a link or not.
    own = resolv_conf.of_process(os.getpid())
    if Path("/etc/resolv.conf").is_symlink():
        with pytest.raises(Unreadable):
            read(own)
    else:
        assert read(own) == read(Path("/etc/resolv.conf"))
    with pytest.raises(Unreadable):
        read(resolv_conf.of_process(2**22 + 1))


def test_a_named_namespace_has_its_own_file() -> None:
    expected = Path("/etc/netns/web/resolv.conf")
    assert resolv_conf.of_netns(Path("/run/netns/web")) == expected
    assert resolv_conf.of_netns(Path("/var/run/netns/web")) == expected
    assert resolv_conf.of_netns(Path("/proc/7/ns/net")) is None


def test_the_pods_own_file_goes_before_the_setting_and_that_before_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "node"
    node.write_text("nameserver 10.0.0.1\n")
    monkeypatch.setattr(resolv_conf, "NODE", node)
    own = tmp_path / "own"
    own.write_text("nameserver 10.0.0.3\nsearch x.example\n")
    servers = ("10.0.0.2:5353",)

    def asked(settings: control_pb2.PodSettings) -> list[str]:
        return list(settings.resolv_conf.nameservers)

    assert asked(told(DnsRules(), pod())) == ["10.0.0.1"]
    assert asked(told(DnsRules(nameservers=servers), pod())) == [*servers]
    found = told(DnsRules(nameservers=servers), pod(own))
    assert (asked(found), list(found.resolv_conf.search)) == (["10.0.0.3"], ["x.example"])
    assert asked(told(DnsRules(), pod(tmp_path / "missing"))) == ["10.0.0.1"]
    # Servers of the node with the pod's search list.
    own.write_text("nameserver 127.0.0.1\nsearch x.example\n")
    found = told(DnsRules(), pod(own))
    assert (asked(found), list(found.resolv_conf.search)) == (["10.0.0.1"], ["x.example"])


def test_the_real_servers_behind_a_stub_on_the_node_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, behind = tmp_path / "stub", tmp_path / "behind"
    stub.write_text("nameserver 127.0.0.53\n")
    behind.write_text("nameserver 192.0.2.1\n")
    monkeypatch.setattr(resolv_conf, "NODE", stub)
    monkeypatch.setattr(resolv_conf, "BEHIND_A_STUB", behind)
    assert resolv_conf.of_node().nameservers == ("192.0.2.1",)


def test_a_pod_or_the_node_opts_out() -> None:
    assert told(DnsRules(), pod()).dns
    for settings in (
        told(DnsRules(), pod(capture=False)),
        told(DnsRules(capture=False), pod()),
    ):
        assert not settings.dns
        assert not settings.HasField("resolv_conf")
