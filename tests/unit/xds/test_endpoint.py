"""Addresses as people write them."""

import pytest

from agent.xds.endpoint import ControlPlaneError, Endpoint


@pytest.mark.parametrize(
    ("written", "dialled"),
    [
        ("https://istiod.istio-system.svc:15012", "istiod.istio-system.svc:15012"),
        ("istiod.istio-system.svc:15012", "istiod.istio-system.svc:15012"),
        ("https://istiod", "istiod:15012"),
        ("https://[fd00::1]:443", "[fd00::1]:443"),
        ("10.0.0.1", "10.0.0.1:15012"),
    ],
)
def test_address_becomes_host_and_port(written: str, dialled: str) -> None:
    assert Endpoint(address=written, root_cert="SYSTEM").host_port() == dialled


@pytest.mark.parametrize("written", ["http://istiod:15010", "https://", "https://a:99999"])
def test_unusable_address_is_named(written: str) -> None:
    with pytest.raises(ControlPlaneError, match="control plane address"):
        Endpoint(address=written, root_cert="SYSTEM").host_port()


def test_system_roots_are_found() -> None:
    assert b"BEGIN CERTIFICATE" in Endpoint(address="a", root_cert="SYSTEM").roots()
