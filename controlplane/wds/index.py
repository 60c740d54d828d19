"""All resources as they are now, and what changed since any recent generation."""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from controlplane.wds import encoding
from controlplane.wds.encoding import ADDRESS, AUTHORIZATION, Resource

# A stream that is further behind gets the difference of everything instead; it costs more, but
# the log of changes stays bounded.
_GENERATIONS = 1000
_PREPARED = 64


@dataclass(frozen=True)
class Update:
    """What one type's followers must be sent; encoded once for all that are equally far."""

    nonce: str
    resources: int
    removed: int
    data: bytes


class Index:
    """Changed only by `replace`; readers see one generation or the next."""

    def __init__(self) -> None:
        self.generation = 0
        self._current: dict[str, dict[str, Resource]] = {ADDRESS: {}, AUTHORIZATION: {}}
        self._log: deque[dict[str, frozenset[str]]] = deque(maxlen=_GENERATIONS)
        self._prepared: dict[tuple[str, int, int, bool, bool], Update | None] = {}
        self._changed = asyncio.Event()

    def replace(self, wanted: Mapping[str, Mapping[str, Message]]) -> dict[str, int]:
        """Takes the messages of every type; returns how many resources of each type changed."""
        changes: dict[str, frozenset[str]] = {}
        for type_url, messages in wanted.items():
            before = self._current[type_url]
            after: dict[str, Resource] = {}
            touched = set(before.keys() - messages.keys())
            for name, message in messages.items():
                old = before.get(name)
                if old is not None and old.message is message:
                    after[name] = old
                    continue
                new = encoding.resource(type_url, name, message)
                if old is not None and old.version == new.version:
                    after[name] = Resource(name, old.version, message, old.framed)
                    continue
                after[name] = new
                touched.add(name)
            self._current[type_url] = after
            if touched:
                changes[type_url] = frozenset(touched)
        if changes:
            self.generation += 1
            self._log.append(changes)
            self._prepared.clear()
            event, self._changed = self._changed, asyncio.Event()
            event.set()
        return {type_url: len(names) for type_url, names in changes.items()}

    async def after(self, generation: int) -> None:
        """Returns as soon as the index is beyond `generation`."""
        while self.generation <= generation:
            await self._changed.wait()

    def count(self, type_url: str) -> int:
        return len(self._current[type_url])

    def first(self, type_url: str, known: Mapping[str, str], nonce: str) -> Update:
        """What a client that holds `known` versions lacks; empty when nothing does."""
        current = self._current[type_url]
        wanted = [item for name, item in current.items() if known.get(name) != item.version]
        removed = known.keys() - current.keys()
        data = encoding.response(type_url, nonce, wanted, removed)
        return Update(nonce, len(wanted), len(removed), data)

    def since(
        self, type_url: str, generation: int, *, upserts: bool = True, removals: bool = True
    ) -> Update | None:
        """Changes of a type after `generation`; None when there are none of the asked sort."""
        key = (type_url, generation, self.generation, upserts, removals)
        if key not in self._prepared:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            self._prepared[key] = self._prepare(type_url, generation, upserts, removals)
        return self._prepared[key]

    def holds(self, generation: int) -> bool:
        """Whether changes since `generation` are still known."""
        return self.generation - generation <= len(self._log)

    def _prepare(
        self, type_url: str, generation: int, upserts: bool, removals: bool
    ) -> Update | None:
        behind = self.generation - generation
        names: set[str] = set()
        for changes in list(self._log)[len(self._log) - behind :]:
            names |= changes.get(type_url, frozenset())
        current = self._current[type_url]
        resources = [current[name] for name in sorted(names & current.keys())] if upserts else []
        removed = names - current.keys() if removals else set()
        if not resources and not removed:
            return None
        part = ("u" if upserts else "") + ("r" if removals else "")
        nonce = f"{generation}-{self.generation}-{part}"
        data = encoding.response(type_url, nonce, resources, removed)
        return Update(nonce, len(resources), len(removed), data)
