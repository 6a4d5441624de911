"""What all tests share: one thread each, no hub, a new cache, and a table of the notebooks' times at the end."""
import os
import shutil
import tempfile
from operator import itemgetter
from pathlib import Path

import pytest
from hypothesis import settings

from ecomopt.core.assets import cache_dir

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist fills the cores; notebook kernels inherit this
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("ecomopt", deadline=None)  # a busy core is not a fault
settings.load_profile("ecomopt")


def pytest_configure(config):
    """A new cache, unless `ECOMOPT_CACHE` names one: what earlier code trained proves nothing. Assets are shared."""
    if hasattr(config, "workerinput") or os.environ.get("ECOMOPT_CACHE"): return
    own, assets = Path(tempfile.mkdtemp(prefix="ecomopt-")), cache_dir() / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    (own / "assets").symlink_to(assets)
    os.environ |= {"ECOMOPT_CACHE": str(own), "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor")}
    config.add_cleanup(lambda: shutil.rmtree(own, ignore_errors=True))


@pytest.fixture(autouse=True)
def environment_stays():
    """A cache, a temporary folder or a directory that a test leaves to the next one changes what that one does."""
    def places(): return os.getcwd(), *map(os.environ.get, ("ECOMOPT_CACHE", "TMPDIR", "HOME", "OMP_NUM_THREADS"))

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
