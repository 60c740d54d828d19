"""`python -m bench`: all scripts with their defaults, one after the other."""

import sys

from bench import capture, push, traffic

if __name__ == "__main__":
    sys.exit(traffic.main([]) or push.main([]) or capture.main([]))
