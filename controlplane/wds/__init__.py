"""The workload API on the wire: an index of resources and the Delta ADS service over it."""
