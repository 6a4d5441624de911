"""The build backend: setuptools, with all metadata read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import build_meta, find_packages, setup
from setuptools.command.sdist import sdist

LICENSES = {"apache2": "Apache-2.0"}


class SourceDist(sdist):
    """An sdist that carries the two files its own build needs."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [*files, "settings.ini", "tools/backend.py"])


def metadata(path: str = "settings.ini") -> dict:
    """The keywords of `setuptools.setup`, read from `path`."""
    parser = ConfigParser(interpolation=None)
    parser.read(path, encoding="utf8")
    ini = parser["DEFAULT"]
    extras = {key.removesuffix("_requirements"): ini[key].split() for key in ini if key.endswith("_requirements")}
    return dict(
        name=ini["lib_name"],
        version=ini["version"],
        description=ini["description"],
        long_description=Path("README.md").read_text(encoding="utf8"),
        long_description_content_type="text/markdown",
        author=ini["author"],
        license_expression=LICENSES[ini["license"]],
        keywords=ini["keywords"].split(),
        python_requires=f">={ini['min_python']}",
        install_requires=ini["requirements"].split(),
        extras_require=extras,
        packages=find_packages(include=[ini["lib_name"], f"{ini['lib_name']}.*"]),
        entry_points={"console_scripts": ini["console_scripts"].split()},
        cmdclass={"sdist": SourceDist},
    )


class Backend(build_meta._BuildMetaBackend):
    """setuptools' PEP 517 backend with our metadata in the place of a setup.py."""

    def run_setup(self, setup_script: str = "setup.py"):
        setup(**metadata())


_backend = Backend()
get_requires_for_build_wheel = _backend.get_requires_for_build_wheel
get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
get_requires_for_build_editable = _backend.get_requires_for_build_editable
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable
build_wheel = _backend.build_wheel
build_sdist = _backend.build_sdist
build_editable = _backend.build_editable
