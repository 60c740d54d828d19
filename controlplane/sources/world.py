"""What a source hands on: all objects as they are now, and what is wrong with the input."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from controlplane.sources.objects import Object

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One mistake in the input. `line` counts from 1, 0 for the whole file."""

    file: str
    line: int
    subject: str
    field: str
    text: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (where, self.subject, self.field) if part) + (
            f" {self.text}" if self.field else f": {self.text}"
        )


class World:
    """Objects by type. Objects that didn't change between two worlds are the same object."""

    def __init__(self, objects: Iterable[Object]) -> None:
        self._by_type: dict[type, list[Object]] = {}
        for item in objects:
            self._by_type.setdefault(type(item), []).append(item)

    def of(self, kind: type[T]) -> list[T]:
        return self._by_type.get(kind, [])  # type: ignore[return-value]
