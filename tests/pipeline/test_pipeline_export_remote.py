"""An export sent to an object store: whole, replaced as a whole, never in place of something else."""

from __future__ import annotations

import fsspec
import pytest

from pipeline.export_folder import MARK, exporting
from pipeline.export_remote import is_remote, send
from schemas.errors import UserError

URL = "memory://bucket/sets/mine"


@pytest.fixture
def store():
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return store


def exported(folder, **texts: str):
    with exporting(folder) as inside:
        (inside / "data").mkdir()
        for name, text in texts.items():
            (inside / "data" / name).write_text(text)
    return folder


def test_what_is_sent_is_what_was_exported_and_a_second_export_replaces_the_first(tmp_path, store):
    send(exported(tmp_path / "one", a="1", b="2"), URL)
    assert store.cat_file("/bucket/sets/mine/data/b") == b"2" and store.exists(f"/bucket/sets/mine/{MARK}")
    send(exported(tmp_path / "two", a="3"), URL)
    assert store.cat_file("/bucket/sets/mine/data/a") == b"3"
    assert not store.exists("/bucket/sets/mine/data/b"), "of the earlier export"


def test_a_place_that_holds_something_else_is_refused_and_kept(tmp_path, store):
    store.pipe_file("/bucket/sets/mine/thesis.txt", b"mine")
    with pytest.raises(UserError, match="something else"):
        send(exported(tmp_path / "one", a="1"), URL)
    assert store.find("/bucket/sets/mine") == ["/bucket/sets/mine/thesis.txt"]


def test_a_copy_that_broke_has_no_mark_and_is_sent_again(tmp_path, store, monkeypatch):
    folder = exported(tmp_path / "one", a="1", b="2")
    put = type(store).put_file

    def breaks(self, source, target, **options):
        if target.endswith("/b"):
            raise OSError("connection reset")
        return put(self, source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", breaks)
        with pytest.raises(UserError, match=r"connection reset.*send it again"):
            send(folder, URL)
    assert not store.exists(f"/bucket/sets/mine/{MARK}")
    send(folder, URL)
    inside = {path.removeprefix("/bucket/sets/mine/") for path in store.find("/bucket/sets/mine")}
    assert inside == {MARK, "data/a", "data/b"}


@pytest.mark.parametrize(("url", "words"), [("nosuch://a/b", "cannot be written"), ("memory://", "names no place")])
def test_a_url_that_cannot_be_one_is_refused(tmp_path, url, words):
    with pytest.raises(UserError, match=words):
        send(tmp_path, url)


def test_a_path_is_no_url():
    assert is_remote("s3://b/c") and not is_remote("runs/export") and not is_remote("/tmp/a:b")
