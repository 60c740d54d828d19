"""From the source's world to what nodes are told: addresses, messages, index, in this order."""

import logging
from collections.abc import Mapping

from controlplane.log import fact
from controlplane.model.translate import Translation, Translator, vip_demand
from controlplane.model.vips import Assignment
from controlplane.sources.manifests import Manifests
from controlplane.vip_store import VipStore, VipStoreError
from controlplane.wds.encoding import ADDRESS, AUTHORIZATION
from controlplane.wds.index import Index

_NO_ACCOUNTS: Mapping[str, frozenset[tuple[str, str]]] = {}
# A pod and the request for its certificate may come within the same moment.
_SETTLE = 1.0

_log = logging.getLogger(__name__)


class Pipeline:
    """`refresh` is the one place that changes the index."""

    def __init__(
        self, manifests: Manifests, translator: Translator, vips: VipStore, index: Index
    ) -> None:
        self.notices: tuple[str, ...] = ()
        self._manifests = manifests
        self._translator = translator
        self._vips = vips
        self._index = index
        self._accounts = _NO_ACCOUNTS

    def refresh(self) -> None:
        """Takes the source's world. When no VIP can be had, services without one go without."""
        world = self._manifests.world
        wanted, taken = vip_demand(world)
        try:
            assigned = self._vips.ensure(wanted, taken)
        except VipStoreError as error:
            assigned = Assignment(self._vips.assigned, (str(error),))
        made = self._translator.translate(world, assigned.vips)
        self._tell(made, assigned.problems)
        self._accounts = made.accounts
        changed = self._index.replace({ADDRESS: made.addresses, AUTHORIZATION: made.authorizations})
        if changed:
            fact(
                _log,
                logging.INFO,
                "resources changed",
                generation=self._index.generation,
                addresses=changed.get(ADDRESS, 0),
                authorizations=changed.get(AUTHORIZATION, 0),
            )

    async def has_pod(self, node: str, namespace: str, account: str) -> bool:
        """Whether this account has a pod on the node, once what is on disk now was read."""
        if (namespace, account) in self._accounts.get(node, frozenset()):
            return True
        await self._manifests.scanned_again(_SETTLE)
        return (namespace, account) in self._accounts.get(node, frozenset())

    def _tell(self, made: Translation, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self.notices:
                fact(_log, logging.ERROR, "no address for a service", problem=problem)
        for notice in made.notices:
            if notice not in self.notices:
                fact(_log, logging.WARNING, "manifest without effect", notice=notice)
        self.notices = (*problems, *made.notices)
