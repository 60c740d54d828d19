"""A text that stands in the configuration where usually a file is named."""


class Literal:
    """Read like the file. Shown, logged or dumped it is only its name: it may be a secret."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text

    def read_text(self, encoding: str = "utf-8") -> str:
        """Raises UnicodeEncodeError, a ValueError, for what a file of this encoding can't hold."""
        self._text.encode(encoding)
        return self._text

    def __str__(self) -> str:
        return self._name

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and (other._name, other._text) == (self._name, self._text)

    def __hash__(self) -> int:
        return hash((self._name, self._text))
