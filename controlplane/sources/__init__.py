"""Where objects come from: typed Kubernetes and Istio objects and the folder they are read from."""
