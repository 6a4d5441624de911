"""The cache on bad disks: what is finished is used, what is damaged is made again, and each error names what helps."""
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from ecomopt import EcomoptError
from ecomopt.core import assets
from ecomopt.core.assets import _atomic_folder, _check_writable, _once, _scratch_folder, _user_path, cached


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(folder):
    (folder / "weights").write_bytes(b"0" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "words.txt").write_text("good\nbad\n")


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# a finished entry needs no lock and no right to write

@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_finished_entry_of_a_read_only_cache_is_used(cache, monkeypatch, number):
    path = cached("demo", {}, build)
    assets._checked.clear()

    def refuse(*args, **kwargs): raise OSError(number, os.strerror(number))

    monkeypatch.setattr(assets, "FileLock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert cached("demo", {}, lambda folder: pytest.fail("builds again")) == path
    with pytest.raises(EcomoptError, match="cannot be written"): cached("demo", {"another": 1}, build)


def test_an_asset_in_a_read_only_cache_is_used(tmp_path, monkeypatch):
    (tmp_path / "assets" / "x").mkdir(parents=True)
    monkeypatch.setattr(assets, "FileLock", lambda *args: pytest.fail("locks"))
    assert _once(tmp_path / "assets" / "x", build) == tmp_path / "assets" / "x"


# a damaged entry is made again

def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "one bit": lambda path: flip(path / "weights"),
    "one bit below": lambda path: flip(path / "sub" / "words.txt"),
    "half a file": lambda path: os.truncate(path / "weights", 500),
    "an empty file": lambda path: os.truncate(path / "weights", 0),
    "a missing file": lambda path: (path / "weights").unlink(),
    "a missing folder": lambda path: shutil.rmtree(path / "sub"),
    "an added file": lambda path: (path / "added_tokens.json").write_text("{}"),
    "a renamed file": lambda path: (path / "weights").rename(path / "w"),
    "no key": lambda path: (path / "key.json").unlink(),
    "half a key": lambda path: os.truncate(path / "key.json", 20),
    "a key of nothing": lambda path: (path / "key.json").write_text("[]"),
    "another key": lambda path: (path / "key.json").write_text('{"key": 1}'),
    "nothing but the folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("a_new_process", [True, False])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(cache, caplog, damage, a_new_process):
    path = cached("demo", {"a": (1, 2)}, build)
    before = contents(path)
    damage(path)
    if a_new_process: assets._checked.clear()
    assert cached("demo", {"a": (1, 2)}, build) == path
    assert contents(path) == before
    assert "made again" in caplog.text and str(path) in caplog.text


def test_hidden_files_of_the_system_do_no_harm(cache):
    path = cached("demo", {}, build)
    (path / ".DS_Store").write_text("")
    assets._checked.clear()
    assert cached("demo", {}, lambda folder: pytest.fail("builds again")) == path


def test_an_entry_without_hashes_is_used(cache):
    path = cached("demo", {}, build)
    key = json.loads((path / "key.json").read_text())
    del key["files"]
    (path / "key.json").write_text(json.dumps(key))
    assert cached("demo", {}, lambda folder: pytest.fail("builds again")) == path


def test_hashes_are_computed_once(cache, monkeypatch):
    path = cached("demo", {}, build)
    for file in path.rglob("*"): os.utime(file, (1e9, 1e9))
    cached("demo", {}, build)
    monkeypatch.setattr(assets, "_sha256", lambda file: pytest.fail("hashes again"))
    assert cached("demo", {}, build) == path


def test_a_change_at_the_moment_of_the_check_is_noticed(cache):
    """The clock of a file system may stand still for some milliseconds."""
    path = cached("demo", {}, build)
    for _ in range(20):
        assert cached("demo", {}, build) == path
        flip(path / "weights")
        assert contents(cached("demo", {}, build))["weights"] == b"0" * 1000


def test_a_damaged_entry_that_cannot_be_removed_is_an_error(cache, monkeypatch):
    path = cached("demo", {}, build)
    flip(path / "weights")

    def refuse(path, *args, **kwargs): raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(EcomoptError, match="read-only") as error: cached("demo", {}, build)
    assert "ECOMOPT_CACHE" in error.value.do


# errors say what and where, and what helps there

REASONS = {
    errno.ENOSPC: "disk is full",
    errno.EDQUOT: "quota",
    errno.EACCES: "may not write",
    errno.EROFS: "read-only",
    errno.ENAMETOOLONG: "name is too long",
    errno.ENOTDIR: "is a file",
    errno.EIO: "fault",
}


@pytest.mark.parametrize("number", REASONS)
@pytest.mark.parametrize("place", ["cache", "user", "temporary"])
def test_the_advice_fits_the_error_and_the_place(tmp_path, monkeypatch, number, place):
    for name in ("cache", "user", "temporary"): (tmp_path / name).mkdir()
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    path = tmp_path / place / "model"
    with pytest.raises(EcomoptError, match=REASONS[number]) as error, _atomic_folder(path):
        raise OSError(number, os.strerror(number))
    assert error.value.where == str(path) and not list((tmp_path / place).iterdir())
    assert ("ECOMOPT_CACHE" in error.value.do) == (place == "cache")
    assert ("TMPDIR" in error.value.do) == (place == "temporary")
    assert ("another path" in error.value.do) == (place != "cache")


@pytest.mark.parametrize("number, text", [(28, "disk is full"), (122, "quota"), (30, "read-only")])
def test_errors_of_rust_have_their_number_in_the_message(tmp_path, number, text):
    with pytest.raises(EcomoptError, match=text), _atomic_folder(tmp_path / "x"):
        raise RuntimeError(f"Error while serializing: I/O error: something (os error {number})")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no", "/elsewhere/data.csv"), ConnectionError("hub"),
                                   PermissionError(13, "no", "/elsewhere/data.csv"), KeyError("x")], ids=repr)
def test_errors_about_other_things_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, _atomic_folder(tmp_path / "x"): raise error
    assert raised.value is error and not list(tmp_path.iterdir())


def test_work_that_another_program_removes_is_an_error(tmp_path):
    with pytest.raises(EcomoptError, match="cannot be written"), _atomic_folder(tmp_path / "x") as part:
        shutil.rmtree(part)
        (part / "y").write_text("")


# a target is looked at before any work

@pytest.mark.parametrize(
    "name, text",
    [
        ("file/model", "is a file"),
        ("file/deep/model", "is a file"),
        ("n" * 300, "name is too long"),
        ("new/" + "n" * 300, "name is too long"),
        ("/proc/model", "cannot be written"),
        ("/dev/null/model", "is a file"),
    ],
)
def test_a_target_that_cannot_be_made(tmp_path, name, text):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EcomoptError, match=text): _check_writable(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_target_without_room(tmp_path):
    _check_writable(tmp_path / "new" / "model")
    with pytest.raises(EcomoptError, match="disk is full"): _check_writable(tmp_path / "new" / "model", 10**18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, "a\0b", b"bytes"])
def test_what_is_no_path(path):
    with pytest.raises(EcomoptError, match="not a path"): _user_path(path)


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _user_path("~/model") == tmp_path / "model"


# unfinished work

def test_unfinished_work_of_living_processes_stays(tmp_path):
    part, lock = _scratch_folder(tmp_path / "x")
    dead = tmp_path / ".x.0123abcd.part"
    dead.mkdir()
    others = [tmp_path / name for name in (".x.part", ".xx.0123abcd.part", ".x.0123abcd.park", "x.0123abcd.part")]
    for other in others: other.mkdir()
    with _atomic_folder(tmp_path / "x"): assert part.exists() and not dead.exists()
    os.close(lock)
    with _atomic_folder(tmp_path / "x"): assert not part.exists()
    assert all(other.exists() for other in others)


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(EcomoptError, match="cannot be written"), _atomic_folder(tmp_path / "x"): pass
    assert [file.name for file in tmp_path.rglob("*")] == ["x", "mine"]
