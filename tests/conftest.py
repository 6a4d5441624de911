"""What all tests share: one thread each, no hub, and a table of the notebooks' times at the end."""
import os
from operator import itemgetter

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist fills the cores; notebook kernels inherit this
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def environment_stays():
    """A cache or a temporary folder that a test leaves to the next one fills the disk."""
    def places(): return {name: os.environ.get(name) for name in ("ECOMOPT_CACHE", "TMPDIR")}

    before = places()
    yield
    assert places() == before


def pytest_terminal_summary(terminalreporter):
    """Print how long each notebook took."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    times = dict(both for report in reports for both in report.user_properties if both[0].endswith(".ipynb"))
    if not times: return
    terminalreporter.section("notebooks, seconds")
    for name, seconds in sorted(times.items(), key=itemgetter(1), reverse=True):
        terminalreporter.write_line(f"{seconds:7.1f}  {name}")
