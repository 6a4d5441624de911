"""What an editor shows of the package: every public name, method, signature and docstring, without running anything."""
import importlib
import inspect
import pkgutil

import jedi
import nbformat
import pytest

import ecomopt
from tools.generate import PACKAGE, typing_block

MODULES = [m.name for m in pkgutil.walk_packages(ecomopt.__path__, "ecomopt.") if not m.ispkg]
CLASSES = sorted({(name, public) for name in MODULES for public in getattr(importlib.import_module(name), "__all__", [])
                  if inspect.isclass(getattr(importlib.import_module(name), public))})


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Two processes that write jedi's cache at once break it."""
    jedi.settings.cache_directory = str(tmp_path_factory.mktemp("jedi"))


def public_methods(cls: type) -> dict[str, object]:
    """What the class itself defines and a user may call or read."""
    kinds = (classmethod, staticmethod, property)
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")
            and (inspect.isfunction(value) or isinstance(value, kinds)) and in_package(value)}


def in_package(value: object) -> bool:
    """Is it ours? A dataclass may take a function of the standard library, such as `asdict`."""
    function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    return getattr(function, "__module__", "").startswith("ecomopt")


@pytest.mark.parametrize("module, name", CLASSES, ids=map(".".join, CLASSES))
def test_methods_are_where_readers_look(module, name):
    """By inspection: named after the class, with a docstring; those of a dataclass and of bases included."""
    cls = getattr(importlib.import_module(module), name)
    assert cls.__doc__ and cls.__qualname__ == name
    for method, value in public_methods(cls).items():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        assert function.__qualname__ == f"{name}.{method}"
        assert function.__name__ == method and "<lambda>" not in function.__qualname__
        assert inspect.getdoc(getattr(cls, method)), f"{name}.{method} has no docstring"
        assert inspect.signature(function)


@pytest.mark.slow
@pytest.mark.parametrize("module, name", CLASSES, ids=map(".".join, CLASSES))
def test_static_completion_lists_every_method(module, name):
    """jedi, as editors use it, reads the files and runs nothing."""
    methods = public_methods(getattr(importlib.import_module(module), name))
    found = {one.name: one for one in jedi.Script(f"from {module} import {name}\n{name}.").complete(2, len(name) + 1)}
    for method, value in methods.items():
        assert method in found, f"completion of {name}. lacks {method}"
        assert found[method].docstring(raw=True) or isinstance(value, property), f"{name}.{method}: no documentation"
        if not isinstance(value, property): assert found[method].get_signatures(), f"{name}.{method}: no signature"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ecomopt._HOME_OF))
def test_names_of_the_top_level_have_documentation_in_editors(name):
    code = f"import ecomopt\necomopt.{name}"
    script = jedi.Script(code)
    value = getattr(ecomopt, name)
    found = script.infer(2, len(code.splitlines()[1]))
    assert found, f"an editor knows nothing of ecomopt.{name}"
    if not callable(value): return
    signatures = jedi.Script(f"{code}(").get_signatures(2, len(f"ecomopt.{name}("))
    shown = [p.name for p in signatures[0].params]  # *args and **others are shown as what they are passed on to
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    wanted = [p.name for p in inspect.signature(value).parameters.values() if p.kind not in variadic]
    assert wanted == [name for name in shown if name in wanted]
    assert found[0].docstring(raw=True)


def test_the_imports_for_editors_are_made_from_the_table_of_homes():
    package = nbformat.read(PACKAGE, 4)
    assert typing_block(package) in [cell.source for cell in package.cells]
    assert {line.split()[-1] for line in typing_block(package).splitlines()[2:]} == set(ecomopt._HOME_OF)
