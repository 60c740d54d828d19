"""What the agent loads of pyroute2, and that nobody else is kept from the whole."""

import subprocess
import sys

PROGRAM = """
import sys
from redirect import routes, rtnetlink
loaded = {name for name in sys.modules if name.startswith("pyroute2")}
assert "pyroute2.ndb.main" not in loaded, loaded
import pyroute2
from pyroute2.netlink.rtnl.fibmsg import fibmsg
assert fibmsg is rtnetlink.RuleMessage
assert pyroute2.NDB
"""


def test_only_what_routes_need_is_loaded_and_the_whole_package_still_can_be() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
