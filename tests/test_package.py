"""The package as others get it: built, installed, imported."""
import ast
import importlib
import inspect
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ecomopt
from ecomopt import EcomoptError

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ConfigParser(interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf8")
INI = SETTINGS["DEFAULT"]
TOP = """settings.ini nbs ecomopt tests benchmarks tools _quarto.yml README.md Makefile pyproject.toml constraints.txt
         CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE .ci .github .gitignore""".split()


def python(*args: str, cwd: Path) -> str:
    """What a fresh process prints."""
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """An sdist made from a copy of the sources, and a wheel made from that sdist alone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    for name in ("ecomopt", "tools"): shutil.copytree(ROOT / name, source / name)
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), cwd=source)
    sdist = next(out.glob("*.tar.gz"))
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(out)]
    python("-m", "pip", "wheel", *options, str(sdist), cwd=out)
    return dict(sdist=sdist, wheel=next(out.glob("*.whl")))


@pytest.mark.xdist_group("build")
def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built["sdist"]) as archive: names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "settings.ini",
        "pyproject.toml",
        "tools/backend.py",
        "README.md",
        "LICENSE",
        "ecomopt/__init__.py",
    } <= names


@pytest.mark.xdist_group("build")
def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(file.relative_to(ROOT)) for file in (ROOT / "ecomopt").rglob("*.py")}


@pytest.mark.xdist_group("build")
def test_metadata_is_that_of_settings(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        read = {Path(name).name: archive.read(name) for name in archive.namelist() if ".dist-info/" in name}
    metadata = message_from_bytes(read["METADATA"])
    same = dict(Name="lib_name", Version="version", Summary="description", Author="author")
    assert {key: metadata[key] for key in same} == {key: INI[name] for key, name in same.items()}
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(f">={INI['min_python']}")
    text = metadata.get_payload(decode=True).decode("utf8")
    assert text.strip() == (ROOT / "README.md").read_text(encoding="utf8").strip()
    extras = {key.removesuffix("_requirements"): INI[key] for key in INI if key.endswith("_requirements")}
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    wanted = [Requirement(text) for text in INI["requirements"].split()]
    wanted += [Requirement(f"{text}; extra == '{extra}'") for extra, texts in extras.items() for text in texts.split()]
    assert set(map(Requirement, metadata.get_all("Requires-Dist"))) == set(wanted)
    scripts = INI["console_scripts"].replace("=", " = ").split()
    assert read["entry_points.txt"].decode().split() == ["[console_scripts]", *scripts]


def test_constraints_pin_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    wanted = [Requirement(text) for key in INI if key.endswith("requirements") for text in INI[key].split()]
    assert [str(one) for one in wanted if not one.specifier.contains(pins.get(canonicalize_name(one.name), "0"))] == []
    assert all("+" not in version for version in pins.values())


def test_imports_are_declared():
    """What a module imports is required; what only a function imports may also be in an extra."""
    def declared(*keys): return {Requirement(text).name.lower() for key in keys for text in INI[key].split()}
    def names(nodes):
        used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        return {name.partition(".")[0] for name in used} - {*sys.stdlib_module_names, "ecomopt"}
    trees = [ast.parse(file.read_text(encoding="utf8")) for file in (ROOT / "ecomopt").rglob("*.py")]
    inside = names(
        node for tree in trees for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)
    )
    at_once = names(node for tree in trees for node in tree.body)
    owners = {"llama_cpp": ["llama-cpp-python"], **packages_distributions()}  # built from source: not in every .venv
    def missing(used, known): return [name for name in used if known.isdisjoint(map(str.lower, owners.get(name, [])))]

    all_extras = [key for key in INI if key.endswith("requirements") and key != "dev_requirements"]
    assert missing(at_once, declared("requirements")) == [] == missing(inside, declared(*all_extras))


def test_import_is_light(tmp_path):
    code = "import sys, ecomopt; print({'torch', 'transformers', 'datasets', 'pandas', 'numpy'} & sys.modules.keys())"
    assert python("-c", code, cwd=tmp_path).strip() == "set()"


@pytest.mark.parametrize("name", sorted(ecomopt._HOME_OF))
def test_lazy_name_is_there(name):
    found, home = getattr(ecomopt, name), importlib.import_module(f"ecomopt.{ecomopt._HOME_OF[name]}")
    assert getattr(found, "_function", found) is getattr(home, name)  # `optimize` is a folder, too


def test_the_folder_optimize_is_called_like_its_function():
    import ecomopt.optimize.recipe as recipe_module
    from ecomopt import optimize

    assert (
        recipe_module.Recipe is ecomopt.Recipe and inspect.signature(optimize).parameters["budget"].default == "20min"
    )
    with pytest.raises(EcomoptError, match="task"): optimize("reviews")


def test_command_line_says_what_it_does(tmp_path):
    script = Path(sys.executable).with_name(INI["console_scripts"].partition("=")[0])
    shown = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "Usage: ecomopt" in shown and "assets" in shown


def test_error_says_what_where_and_what_to_do():
    error = pickle.loads(pickle.dumps(EcomoptError("no column", "mine.csv", "pass text=")))
    assert (error.what, error.where, error.do) == ("no column", "mine.csv", "pass text=")
    assert all(part in str(error) for part in (error.what, error.where, error.do))


def test_top_level_is_the_documented_one():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()] + [".git"]
    names = {path.name for path in ROOT.iterdir()}
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)} == set(TOP)
