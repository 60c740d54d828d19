"""The index: whoever follows its updates from any point ends with what it holds."""

from hypothesis import given
from hypothesis import strategies as st

from controlplane.wds.encoding import ADDRESS, AUTHORIZATION
from controlplane.wds.index import Index, Update
from proto.gen import discovery_pb2, workload_pb2

_NAMES = st.sampled_from("abcdef")
_STATES = st.lists(st.dictionaries(_NAMES, st.integers(0, 3), max_size=6), min_size=1, max_size=8)


def messages(state: dict[str, int]) -> dict[str, workload_pb2.Address]:
    return {
        name: workload_pb2.Address(workload=workload_pb2.Workload(uid=name, node=str(value)))
        for name, value in state.items()
    }


def replace(index: Index, state: dict[str, int]) -> dict[str, int]:
    return index.replace({ADDRESS: messages(state), AUTHORIZATION: {}})


def apply(held: dict[str, str], update: Update | None) -> None:
    """As a client does."""
    if update is None:
        return
    response = discovery_pb2.DeltaDiscoveryResponse.FromString(update.data)
    assert response.type_url == ADDRESS
    for item in response.resources:
        address = workload_pb2.Address.FromString(item.resource.value)
        assert address.workload.uid == item.name
        held[item.name] = item.version
    for name in response.removed_resources:
        held.pop(name, None)


def versions(index: Index) -> dict[str, str]:
    held: dict[str, str] = {}
    apply(held, index.first(ADDRESS, {}, "n"))
    return held


@given(states=_STATES, joins=st.integers(0, 7), step=st.integers(1, 3))
def test_a_follower_holds_what_the_index_holds(
    states: list[dict[str, int]], joins: int, step: int
) -> None:
    index = Index()
    held: dict[str, str] | None = None
    generation = 0
    for number, state in enumerate(states):
        replace(index, state)
        if held is None and number >= joins:
            held, generation = versions(index), index.generation
        elif held is not None and number % step == 0:
            apply(held, index.since(ADDRESS, generation))
            generation = index.generation
    if held is not None:
        apply(held, index.since(ADDRESS, generation))
        assert held == versions(index)


@given(before=_STATES, after=_STATES)
def test_a_client_that_comes_back_lacks_exactly_what_changed(
    before: list[dict[str, int]], after: list[dict[str, int]]
) -> None:
    old, new = Index(), Index()
    replace(old, before[-1])
    replace(new, after[-1])
    held = versions(old)
    update = new.first(ADDRESS, held, "n")
    same = {name for name, value in before[-1].items() if after[-1].get(name) == value}
    assert update.resources == len(after[-1].keys() - same)
    apply(held, update)
    assert held == versions(new)


def test_equal_content_is_no_change() -> None:
    index = Index()
    assert replace(index, {"a": 1, "b": 2}) == {ADDRESS: 2}
    assert replace(index, {"a": 1, "b": 2}) == {}
    assert index.generation == 1


def test_followers_that_are_equally_far_share_one_encoding() -> None:
    index = Index()
    replace(index, {"a": 1})
    replace(index, {"a": 2})
    first = index.since(ADDRESS, 1)
    assert first is not None
    assert index.since(ADDRESS, 1) is first
