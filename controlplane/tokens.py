"""Node tokens: signed, expiring proofs of which node asks (JWT, HS256, key in the state folder)."""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from controlplane import state_files

# Long enough that a machine that was off for a holiday still joins; nodes re-read the file.
DEFAULT_TTL = timedelta(days=30)
ISSUER = "underpass"

_KEY_FILE = "token-key"
_KEY_BYTES = 32
# One fixed header: a verifier that reads the algorithm from the token can be told "none".
_HEADER = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=").decode()


class TokenError(ValueError):
    """The text says what is wrong with the token and how to get a good one."""


@dataclass(frozen=True)
class NodeToken:
    """A verified token; `expires` in seconds of the epoch."""

    node: str
    expires: float


class TokenKey:
    """Signs and verifies node tokens."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def load(cls, state: Path) -> "TokenKey":
        """Reads the key of this state folder, or creates folder and key (0600)."""
        path = state / _KEY_FILE
        try:
            state_files.ensure_folder(state)
            key = (
                path.read_bytes()
                if path.exists()
                else state_files.create(path, secrets.token_bytes(_KEY_BYTES), state_files.SECRET)
            )
        except OSError as error:
            raise TokenError(f"{path}: {error.strerror}: name a state folder of yours") from error
        if len(key) != _KEY_BYTES:
            raise TokenError(f"{path}: not a token key: remove it, then issue all tokens anew")
        return cls(key)

    def issue(self, node: str, ttl: timedelta, *, now: float | None = None) -> str:
        """A token for `node`. Raises TokenError when node or ttl make no sense."""
        if not node or any(char.isspace() for char in node):
            raise TokenError(
                f"node {node!r}: give the node's name as pods have it in spec.nodeName"
            )
        if ttl <= timedelta(0):
            raise TokenError("the token's life must be longer than nothing")
        issued = time.time() if now is None else now
        claims = {
            "iss": ISSUER,
            "sub": node,
            "iat": int(issued),
            "exp": int(issued + ttl.total_seconds()),
        }
        payload = _encode(json.dumps(claims, separators=(",", ":")).encode())
        signed = f"{_HEADER}.{payload}"
        return f"{signed}.{_encode(self._mac(signed))}"

    def verify(self, token: str, *, now: float | None = None) -> NodeToken:
        """Raises TokenError unless this key signed the token and it hasn't expired."""
        signed, _, mac = token.strip().rpartition(".")
        try:
            given = _decode(mac)
        except (binascii.Error, ValueError):
            given = b""
        if not hmac.compare_digest(given, self._mac(signed)):
            raise TokenError(
                "the token was not signed by this control plane: make one with "
                "`underpass controlplane token --node NODE`"
            )
        header, _, payload = signed.partition(".")
        claims = json.loads(_decode(payload))
        if header != _HEADER or claims["iss"] != ISSUER:
            raise TokenError("the token is of another kind than node tokens")
        verified = NodeToken(str(claims["sub"]), float(claims["exp"]))
        if (time.time() if now is None else now) >= verified.expires:
            raise TokenError(
                f"the token of node {verified.node} has expired: make a new one with "
                f"`underpass controlplane token --node {verified.node}`"
            )
        return verified

    def _mac(self, signed: str) -> bytes:
        return hmac.new(self._key, signed.encode(), hashlib.sha256).digest()


def issue(state: Path, node: str, ttl: timedelta = DEFAULT_TTL) -> str:
    """A token for `node`, signed by the key of this state folder. Raises TokenError."""
    return TokenKey.load(state).issue(node, ttl)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
