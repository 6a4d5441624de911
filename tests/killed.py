"""A search that is really killed: used by the tests of search and of Bayesian optimization."""
import subprocess
import sys
import time
from pathlib import Path


def outputs_and_lines(program: str, lines: int, folder: Path) -> tuple[str, str, int]:
    """Outputs of a program that is killed and started again, and of one that is not; lines of the journal at the kill.

    The program writes a journal to the path that it is given; it is killed by `kill -9` when that has `lines` lines.
    """
    (folder / "program.py").write_text(program)
    def start(name):
        command = [sys.executable, folder / "program.py", folder / name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process, journal = start("killed"), folder / "killed"
    def written() -> int: return len(journal.read_text().splitlines()) if journal.exists() else 0

    while process.poll() is None and written() < lines: time.sleep(0.01)
    process.kill()
    process.communicate()
    at_the_kill = written()
    return start("killed").communicate()[0], start("whole").communicate()[0], at_the_kill
