"""`python -m bench`: both scripts with their defaults, one after the other."""

import sys

from bench import push, traffic

if __name__ == "__main__":
    sys.exit(traffic.main([]) or push.main([]))
