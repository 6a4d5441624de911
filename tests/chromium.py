"""Headless Chromium for tests of pages."""
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def headless(window: str) -> Iterator[webdriver.Chrome]:
    """A browser of this size that keeps a log of its console and of its requests, and has a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in f"""user-data-dir={profile} window-size={window} headless no-sandbox disable-gpu no-first-run
                disable-dev-shm-usage disable-background-networking disable-component-update disable-sync""".split():
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try: yield driver
        finally: driver.quit()
