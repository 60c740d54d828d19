"""In which form a client gets a text: media type and compression, by what its request accepts."""

import zlib
from collections.abc import Iterator

# facts ztunnel 13, row 15020. The body is the same.
OPENMETRICS = "application/openmetrics-text;charset=utf-8;version=1.0.0"
PLAIN = "text/plain; charset=utf-8"

# In the order in which they are preferred where a client leaves it open. The standard library has
# neither brotli nor (in Python 3.11) zstd; scrapers ask for gzip.
_WINDOWS = {"gzip": 31, "deflate": 15}
# Metrics repeat themselves: the lowest level makes a twentieth of them, and costs least.
_LEVEL = 1


def media_type(accept: str) -> str:
    wanted = _weights(accept).get("application/openmetrics-text", 0)
    return OPENMETRICS if wanted > 0 else PLAIN


def compression(accept_encoding: str) -> str:
    """gzip, deflate, or identity."""
    weights = _weights(accept_encoding)
    anything = weights.get("*", 0.0)
    offers = {name: weights.get(name, anything) for name in _WINDOWS}
    best = max(offers, key=lambda name: offers[name])
    if offers[best] <= 0 or offers[best] < weights.get("identity", 0.0):
        return "identity"
    return best


class Packed:
    """A text that waits compressed, however it will leave: that of a large node is a burden."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._packer = zlib.compressobj(_LEVEL, wbits=_WINDOWS.get(encoding, 31))
        self._pieces: list[bytes] = []

    def add(self, text: bytes) -> None:
        self._keep(self._packer.compress(text))

    def pieces(self) -> Iterator[bytes]:
        """All of it in the form asked for; nothing can be added any more."""
        self._keep(self._packer.flush())
        if self._encoding != "identity":
            yield from self._pieces
            return
        unpacker = zlib.decompressobj(wbits=31)
        for piece in self._pieces:
            yield unpacker.decompress(piece)

    def _keep(self, piece: bytes) -> None:
        if piece:
            self._pieces.append(piece)


def _weights(header: str) -> dict[str, float]:
    """Name -> q, of `name;parameter=value;q=0.5, name`; what can't be read weighs nothing."""
    found: dict[str, float] = {}
    for entry in header.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        if name:
            found[name] = max(weight, found.get(name, 0.0))
    return found
