"""What the bench makes of a generator's output and of a prober's file."""

from pathlib import Path

import pytest

from bench import prober
from bench.load import LoadError, parse_wrk

GOOD = """\
Running 5s test @ http://10.99.2.10:8080/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   675.02us  335.62us  13.28ms   98.10%
  118366 requests in 5.10s, 22.58MB read
Requests/sec:  23209.02
"""


def test_wrk_rate_is_requests_by_time() -> None:
    assert parse_wrk(GOOD).rate == pytest.approx(118366 / 5.1)


@pytest.mark.parametrize(
    "line",
    ["  Socket errors: connect 0, read 3, write 0, timeout 1", "  Non-2xx or 3xx responses: 7"],
)
def test_run_with_errors_is_no_result(line: str) -> None:
    with pytest.raises(LoadError, match=line.strip()[:12]):
        parse_wrk(GOOD + line + "\n")


def test_output_without_a_count_is_no_result() -> None:
    with pytest.raises(LoadError, match="unable to connect"):
        parse_wrk("unable to connect to 10.0.0.1:80")


def test_probe_that_began_before_the_push_and_ended_in_it_counts(tmp_path: Path) -> None:
    file = tmp_path / "probes"
    file.write_text("1.000000 2.000 \n9.900000 300.000 \n10.300000 4.000 timed out\n20.0 9.0 \n")
    seen = prober.stalls(prober.read(file), 10, 11)
    assert (seen.count, seen.failures, seen.longest) == (2, 1, 300)
