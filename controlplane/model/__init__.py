"""Pure translation of objects into the workload API (facts istio-ambient 6)."""
