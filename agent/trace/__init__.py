"""Live tracing. `child` runs as a process of its own, is the only one that loads bcc, and tells
events as lines of JSON; the rest turns these into what `underpass trace` prints."""
