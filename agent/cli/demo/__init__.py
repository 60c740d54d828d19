"""The demo: two nodes made of network namespaces, a small shop on them, and a story that proves
each claim. The world builder also serves the namespace tests and the benchmarks.
"""
