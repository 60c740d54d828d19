"""One authorization policy of a local file, in the shape of a dump (facts ztunnel 13.1)."""

from agent.xds import fields
from agent.xds.fields import Fields, LocalFileError
from proto.gen import authorization_pb2 as pb

_SCOPES = {
    "Global": pb.GLOBAL,
    "Namespace": pb.NAMESPACE,
    "WorkloadSelector": pb.WORKLOAD_SELECTOR,
}
_ACTIONS = {"Allow": pb.ALLOW, "Deny": pb.DENY}
_STRINGS = {
    "namespaces": "namespaces",
    "notNamespaces": "not_namespaces",
    "principals": "principals",
    "notPrincipals": "not_principals",
}
_NETWORKS = {
    "sourceIps": "source_ips",
    "notSourceIps": "not_source_ips",
    "destinationIps": "destination_ips",
    "notDestinationIps": "not_destination_ips",
}
_PORTS = {
    "destinationPorts": "destination_ports",
    "notDestinationPorts": "not_destination_ports",
}
_ACCOUNTS = {
    "serviceAccounts": "service_accounts",
    "notServiceAccounts": "not_service_accounts",
}


def policy(given: Fields) -> pb.Authorization:
    """Raises LocalFileError naming the field."""
    found = pb.Authorization(
        name=given.text("name", None),
        namespace=given.text("namespace", None),
        scope=given.choice("scope", _SCOPES, pb.GLOBAL),
        # No default: a policy that means to deny must not allow for want of a key.
        action=_action(given),
        dry_run=given.flag("dryRun"),
    )
    for raw_rule, rule_path in given.items("rules"):
        rule = found.rules.add()
        for raw_clause, clause_path in _list(raw_rule, rule_path):
            clause = rule.clauses.add()
            for raw_match, match_path in _list(raw_clause, clause_path):
                clause.matches.append(_match(Fields(raw_match, match_path)))
    given.end()
    return found


def _action(given: Fields) -> pb.Action:
    if not given.has("action"):
        raise LocalFileError(f"{given.path}.action: is missing; Allow or Deny")
    return given.choice("action", _ACTIONS, pb.DENY)


def _match(given: Fields) -> pb.Match:
    match = pb.Match()
    for key, name in _STRINGS.items():
        getattr(match, name).extend(_string(raw, path) for raw, path in given.items(key))
    for key, name in _NETWORKS.items():
        for raw, path in given.items(key):
            packed, length = fields.network(raw, path)
            getattr(match, name).add(address=packed, length=length)
    for key, name in _PORTS.items():
        getattr(match, name).extend(
            fields.whole(raw, path, 65535) for raw, path in given.items(key)
        )
    for key, name in _ACCOUNTS.items():
        for raw, path in given.items(key):
            account = Fields(raw, path)
            getattr(match, name).add(
                namespace=account.text("namespace"),
                serviceAccount=account.text("serviceAccount", None),
            )
            account.end()
    given.end()
    return match


def _string(raw: object, path: str) -> pb.StringMatch:
    if isinstance(raw, str):
        raise LocalFileError(f"{path}: write Exact: {raw!r} (or Prefix, Suffix, Presence)")
    given = Fields(raw, path)
    match = pb.StringMatch()
    if given.has("Presence"):
        list(given.items("Presence"))
        match.presence.SetInParent()
    else:
        kinds = [kind for kind in ("Exact", "Prefix", "Suffix") if given.has(kind)]
        if len(kinds) != 1:
            raise LocalFileError(f"{path}: exactly one of Exact, Prefix, Suffix, Presence")
        setattr(match, kinds[0].lower(), given.text(kinds[0]))
    given.end()
    return match


def _list(raw: object, path: str) -> list[tuple[object, str]]:
    if not isinstance(raw, list):
        raise LocalFileError(f"{path}: a list is expected (rules are lists of lists of matches)")
    return [(item, f"{path}[{index}]") for index, item in enumerate(raw)]
