"""Where a control plane is and how to prove who is who: address, roots, token, headers.

Files are read anew at every connect, so a rotated token or root needs no restart.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from agent.errors import AgentError
from agent.literal import Literal

DEFAULT_PORT = 15012
SYSTEM_ROOTS = "SYSTEM"


class ControlPlaneError(AgentError):
    """The control plane can't be used; the text names the address and what to do."""

    retryable = True


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One TLS address of a control plane (facts ztunnel 7.1)."""

    # "https://host:port" or "host:port"; without a port 15012.
    address: str
    # A path, PEM text, or the word SYSTEM.
    root_cert: str
    # A further name that the server's certificate may carry.
    alt_hostname: str | None = None
    # None: no token is sent.
    token_path: Path | Literal | None = None
    cluster_id: str = "Kubernetes"
    headers: Mapping[str, str] = field(default_factory=dict)
    # TCP and TLS together; facts ztunnel 7.1.
    connect_timeout: timedelta = timedelta(seconds=5)

    def host_port(self) -> str:
        """The address as gRPC wants it. Raises ControlPlaneError for what isn't TLS."""
        text = self.address if "://" in self.address else f"https://{self.address}"
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port or DEFAULT_PORT
        except ValueError as error:
            raise ControlPlaneError(f"control plane address {self.address}: {error}") from error
        if parts.scheme != "https":
            raise ControlPlaneError(
                f"control plane address {self.address}: only https is possible, "
                "tokens are never sent in clear"
            )
        if not host:
            raise ControlPlaneError(f"control plane address {self.address}: no host in it")
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def roots(self) -> bytes:
        """PEM of the trusted roots, read now. Raises ControlPlaneError naming the file."""
        if self.root_cert == SYSTEM_ROOTS:
            return _system_roots()
        if "-----BEGIN" in self.root_cert:
            return _checked(self.root_cert.encode(), "the configured root certificate text")
        try:
            pem = Path(self.root_cert).read_bytes()
        except OSError as error:
            raise ControlPlaneError(
                f"root certificates for {self.address}: {self.root_cert}: {error.strerror}; "
                "mount them there, or set another path, PEM text or SYSTEM"
            ) from error
        return _checked(pem, self.root_cert)

    def metadata(self) -> list[tuple[str, str]]:
        """Headers of every call, the token read now. Raises ControlPlaneError naming the file."""
        found = [(name.lower(), value) for name, value in self.headers.items()]
        if self.cluster_id:
            found.append(("clusterid", self.cluster_id))
        if self.token_path is not None:
            found.append(("authorization", f"Bearer {_token(self.token_path)}"))
        return found


def _token(path: Path | Literal) -> str:
    try:
        # Written by tools that end files with a newline, which is no part of a header.
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ControlPlaneError(f"token file {path}: {error.strerror}") from error
    except UnicodeError as error:
        raise ControlPlaneError(f"token file {path}: not a token, it isn't ASCII text") from error
    if not token:
        raise ControlPlaneError(f"token file {path} is empty; write a new token into it")
    if any(not char.isprintable() or char.isspace() for char in token):
        raise ControlPlaneError(f"token file {path}: not a token, it holds more than one word")
    return token


def _checked(pem: bytes, where: str) -> bytes:
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ControlPlaneError(f"{where}: no usable PEM certificate in it: {error}") from error
    return pem


def _system_roots() -> bytes:
    paths = ssl.get_default_verify_paths()
    for name in (paths.cafile, "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/cert.pem"):
        if name and Path(name).is_file():
            return Path(name).read_bytes()
    raise ControlPlaneError(
        "root certificates: SYSTEM is set, but this system has no bundle; install ca-certificates"
    )
