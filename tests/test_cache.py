"""Cache files: where they are kept, and which ones are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import cache, forms
from fastrnn.cpu import machine
from fastrnn.planner import use_path

has_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes")
OTHER = 12345  # an unused user and group ID


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file in the cache."""
    path = tmp_path / "above" / "folder" / "file"
    cache.write(path, b"content")
    return path


def test_a_write_that_fails_leaves_the_file_as_it_was(kept, monkeypatch):
    """Written beside it and then renamed, so that other processes see all of it or nothing."""

    def replace(part, path):
        assert Path(part).read_bytes() == b"other"
        assert kept.read_bytes() == b"content"
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        cache.write(kept, b"other")
    assert kept.read_bytes() == b"content"
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("own", "shared", "folder"),
    [
        ("~", "", "HOME"),
        ("~/kernels", "/shared", "HOME/kernels"),
        ("/own/~", "/shared", "/own/~"),
        ("own/kernels", "/shared", "own/kernels"),
        ("", "/shared", "/shared/fastrnn"),
        ("", "", "HOME/.cache/fastrnn"),
        ("", "shared", "HOME/.cache/fastrnn"),
        ("", "./shared", "HOME/.cache/fastrnn"),
        ("", "~/shared", "HOME/.cache/fastrnn"),
    ],
)
def test_folder_of_the_cache(tmp_path, monkeypatch, own, shared, folder):
    for name, value in (("HOME", str(tmp_path)), ("USERPROFILE", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FASTRNN_CACHE_DIR", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    assert cache.cache_folder() == Path(folder.replace("HOME", str(tmp_path)))


@pytest.mark.skipif(sys.platform == "win32", reason="users' homes are guessed")
def test_folder_of_another_user(monkeypatch):
    import pwd

    user = pwd.getpwuid(os.getuid())
    monkeypatch.setenv("FASTRNN_CACHE_DIR", f"~{user.pw_name}/kernels")
    assert cache.cache_folder() == Path(user.pw_dir) / "kernels"


def test_what_is_written_is_read(kept, caplog):
    assert cache.read(kept) == b"content"
    cache.write(kept, b"new")
    assert cache.read(kept) == b"new"
    assert list(kept.parent.iterdir()) == [kept], "a file was left behind"
    assert cache.read(kept.with_name("missing")) is None
    assert cache.read(kept.parent / "missing" / "file") is None
    assert not caplog.records


@has_owners
def test_nobody_else_can_write_what_is_made(tmp_path):
    umask = os.umask(0)
    try:
        cache.write(tmp_path / "above" / "folder" / "file", b"content")
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"above": 0o700, "folder": 0o700, "file": 0o600}


def test_a_file_that_cannot_be_written(kept):
    (kept.parent / "taken" / "below").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        cache.write(kept.parent / "taken", b"content")
    assert {path.name for path in kept.parent.iterdir()} == {"file", "taken"}, "a part was left"


# What makes a file unsafe, and the warning about it.


def _chown(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, OTHER, -1, follow_symlinks=False)


def _linked(path: Path, place: Path) -> None:
    """Move a file or folder, and leave a link to its new place."""
    path.rename(place)
    path.symlink_to(place)


def _linked_elsewhere(file: Path) -> None:
    (file.parents[2] / "open").mkdir()
    _linked(file.parent, file.parents[2] / "open" / "moved")
    (file.parents[2] / "open").chmod(0o777)


def _linked_through_elsewhere(file: Path) -> None:
    """Link via a link in a world-writable folder; both ends belong to the user."""
    top = file.parents[2]
    (top / "open").mkdir()
    _linked(file.parent, top / "moved")
    (top / "open" / "link").symlink_to(top / "moved")
    file.parent.unlink()
    file.parent.symlink_to(top / "open" / "link")
    (top / "open").chmod(0o777)


def _linked_by_another(file: Path) -> None:
    _linked(file.parent, file.parents[2] / "moved")
    _chown(file.parent)


UNSAFE: dict[str, tuple[Callable[[Path], None], str]] = {
    "file of the group": (lambda file: file.chmod(0o660), "{file} is writable by other users"),
    "file of anybody": (lambda file: file.chmod(0o602), "{file} is writable by other users"),
    "file of another": (_chown, "{file} belongs to another user"),
    "file is a link": (lambda file: _linked(file, file.with_name("moved")), "links: '{file}'"),
    "file is a folder": (lambda file: (file.unlink(), file.mkdir()), "directory"),
    "file is a pipe": (lambda file: (file.unlink(), os.mkfifo(file, 0o600)), "not a regular file"),
    "folder of the group": (lambda file: file.parent.chmod(0o770), "folder is writable"),
    "folder of anybody": (lambda file: file.parent.chmod(0o777), "folder is writable"),
    "folder as /tmp": (lambda file: file.parent.chmod(0o1777), "folder is writable"),
    "folder of another": (lambda file: _chown(file.parent), "folder belongs to another user"),
    "folder linked by another": (_linked_by_another, "folder belongs to another user"),
    "folder linked elsewhere": (_linked_elsewhere, "open is writable by other"),
    "folder linked through elsewhere": (_linked_through_elsewhere, "open is writable by other"),
    "above, of the group": (lambda file: file.parents[1].chmod(0o770), "above is writable"),
    "above, of another": (lambda file: _chown(file.parents[1]), "above belongs to another user"),
}  # fmt: skip


@has_owners
@pytest.mark.parametrize("what", UNSAFE)
def test_what_others_can_write_is_not_read(kept, caplog, what):
    make_unsafe, message = UNSAFE[what]
    make_unsafe(kept)
    assert cache.read(kept) is None
    assert cache.read(kept) is None
    assert [record.name for record in caplog.records] == ["fastrnn"], "warned once"
    assert message.format(file=kept.name) in caplog.text


@has_owners
def test_what_another_user_wrote_is_not_read(kept, caplog, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert cache.read(kept) is None
    assert "belongs to another user" in caplog.text


@has_owners
@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.chmod(0o644),
        lambda file: file.parent.chmod(0o755),
        lambda file: file.parents[1].chmod(0o1777),  # as /tmp
        lambda file: _linked(file.parent, file.parents[2] / "moved"),
        lambda file: _linked(file.parents[1], file.parents[2] / "moved"),
    ],
    ids=["file read by all", "folder read by all", "below one as /tmp", "linked", "linked above"],
)
def test_what_only_the_user_can_write_is_read(kept, caplog, change):
    change(kept)
    assert cache.read(kept) == b"content"
    assert not caplog.records


def test_without_owners(kept, monkeypatch):
    kept.chmod(0o666)
    monkeypatch.delattr(os, "geteuid", raising=False)
    assert cache.read(kept) == b"content"


# Compiled kernels.


@pytest.fixture
def compiled(tmp_path, monkeypatch, caplog):
    """Run a layer as a new process would; return its output, its log and the cache file."""
    engine = pytest.importorskip("fastrnn.cpu.engine")
    if machine.target() is None:
        pytest.skip("no kernels for this CPU")
    folder = tmp_path / "above" / "folder"
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(folder))
    rnn, x = fastrnn.RNN(5, 9), torch.randn(7, 3, 5)

    def run() -> tuple[torch.Tensor, str, Path]:
        caplog.clear()
        monkeypatch.setattr(engine, "_loaded", {})
        monkeypatch.setattr(forms, "_prepared", {})
        with use_path("kernels"), torch.no_grad():
            y, _ = rnn(x)
        return y, caplog.text, next(folder.glob("*.o"))

    return run


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.sweep(5)
@has_owners
@pytest.mark.parametrize(
    "what",
    [
        "file of the group", "file of another", "file is a link", "file is cut",
        "folder of anybody", "folder of another", "folder linked by another", "above, of the group",
    ],
)  # fmt: skip
def test_unsafe_kernels_are_compiled_again(compiled, what):
    expected, log, file = compiled()
    assert "compiling the rnn_tanh kernels" in log
    assert "not loaded" not in log
    y, log, _ = compiled()
    assert torch.equal(y, expected)
    assert "compil" not in log, "it was kept"
    make_unsafe, message = {**UNSAFE, "file is cut": (_cut, "{file} is corrupt")}[what]
    make_unsafe(file)
    y, log, _ = compiled()
    assert torch.equal(y, expected)
    assert message.format(file=file.name) in log
    assert "compiling the rnn_tanh kernels" in log
