"""The main job: run the quickstart in full, print its table, say where everything lies."""
import shutil
import threading
import time
from pathlib import Path

import nbformat

from tools import site

NOTEBOOK = site.NBS / "start" / "01_quickstart.ipynb"
RESULTS = NOTEBOOK.parent / "quickstart"


def output_of(notebook: Path, start: str) -> str:
    "What the cell whose source starts with `start` put out, as text."
    cell = next(c for c in nbformat.read(notebook, 4).cells if c.source.startswith(start))
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs).strip()


def run() -> Path:
    "Execute the notebook and show the seconds pass; finished steps are read from the cache."
    if not (RESULTS / "artifact").exists(): shutil.rmtree(site.RUN / "full" / "start", ignore_errors=True)
    start, done = time.time(), threading.Event()

    def tick():
        while not done.wait(1):
            print(f"\rfine-tune, distill, quantize, measure, save, load … {time.time() - start:4.0f} s", end="", flush=True)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        return site.execute(NOTEBOOK, fast=False)
    finally:
        done.set()
        ticker.join()
        print(f"\rDone in {time.time() - start:.0f} s.{'':50}")


if __name__ == "__main__":
    print("The quickstart runs in full: a few minutes the first time, seconds after that.")
    executed = run()
    for start in ("models =", "first, *_, last", "sentences ="): print(f"\n{output_of(executed, start)}")
    for name, path in (("notebook", executed), ("figure", RESULTS / "tradeoff.png"), ("artifact", RESULTS / "artifact")):
        print(f"{name:9} {path.relative_to(site.ROOT)}")
