"""The embedded control plane: Kubernetes and Istio manifests in, workload API and certificates out.

Names for the command line (`agent/cli` is the only importer):

- `controlplane.server.Options`: frozen dataclass; every field but `manifests` and `state` has a
  default.
- `controlplane.server.run(Options) -> int`: blocks until SIGTERM or SIGINT; 0 after a clean end,
  64 with all bad options printed together, 1 when it can't serve.
- `controlplane.tokens.issue(state, node, ttl=DEFAULT_TTL) -> str`: a node token for
  `underpass controlplane token --node N`; works before the first start and while it runs.
  Raises `controlplane.tokens.TokenError` (ValueError) with a text for the user.

What others find in the state folder: `root-cert.pem` (roots for agents, 0644), `status.json`
(sources' problems, connected nodes; rewritten on change).
"""
