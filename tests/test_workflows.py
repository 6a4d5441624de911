"""The workflows of the published repository: they keep their schemas, and run what a contributor runs."""
import configparser
import subprocess
import sys

import pytest
import yaml

from tools.run import ROOT

FILES = {
    ".github/workflows/tests.yml": "vendor.github-workflows",
    ".github/workflows/site.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
}


@pytest.mark.parametrize("name", FILES)
def test_it_keeps_its_schema(name):
    pytest.importorskip("check_jsonschema", reason="a development requirement: `make test` installs it")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", FILES[name], str(ROOT / name)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_no_workflow_is_left_unchecked():
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.y*ml")} == {*FILES}


def test_the_tests_run_on_the_oldest_python_that_is_supported():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", "utf8")
    job = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf8"))["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"][0] == settings["DEFAULT"]["min_python"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test PYTHON=python"]
