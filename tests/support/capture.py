"""In which capture modes the tests that have a mesh run."""

# As `--capture` takes them; each such test runs once in each.
CAPTURE_MODES = ("nftables", "ebpf")
