"""What all kinds share: metadata and label selectors."""

from collections.abc import Mapping

from controlplane.sources.fields import Field
from controlplane.sources.objects import Meta

CLUSTER_SCOPED = ("Namespace", "Node", "GatewayClass")


def meta(document: Field, kind: str) -> Meta:
    field = document.require("metadata", "give at least a name")
    name = field.require("name", "name the object").filled()
    namespace = ""
    if kind not in CLUSTER_SCOPED:
        given = field.get("namespace")
        # As kubectl does without a context.
        namespace = given.filled() if given else "default"
        if "/" in namespace:
            raise field.fail("a namespace holds no slash")
    if "/" in name:
        raise field.fail("a name holds no slash")
    labels = _labels(field, "labels")
    uid = field.get("uid")
    created = field.get("creationTimestamp")
    return Meta(
        kind=kind,
        namespace=namespace,
        name=name,
        uid=uid.filled() if uid else "",
        labels=labels,
        annotations=_labels(field, "annotations"),
        created=created.text() if created else "",
        deleting=field.get("deletionTimestamp") is not None,
        owner=_owner(field),
        line=field.line,
        label_set=frozenset(labels.items()),
    )


def match_labels(parent: Field, name: str, labels: str = "matchLabels") -> Mapping[str, str]:
    """`parent.name.matchLabels`; an absent one is the empty selector."""
    field = parent.get(name)
    if field is None:
        return {}
    field.only(labels)
    found = field.get(labels)
    if found is None:
        return {}
    for key, value in found.entries():
        if "*" in key or "*" in value.text():
            raise value.fail("selectors take no wildcards: write the label out")
    return found.labels()


def _labels(field: Field, name: str) -> Mapping[str, str]:
    found = field.get(name)
    return found.labels() if found else {}


def _owner(field: Field) -> tuple[str, str] | None:
    owners = field.get("ownerReferences")
    for owner in owners.items() if owners else ():
        controller = owner.get("controller")
        if controller is not None and controller.boolean():
            return (
                owner.require("kind", "name the owner's kind").text(),
                owner.require("name", "name the owner").text(),
            )
    return None
