"""Atomic file writes."""

from __future__ import annotations

import os
import stat

import pytest

from deltaw.atomic_files import atomic_path, write_text
from deltaw.errors import UserError


def test_failed_write_keeps_previous_file_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_creates_file_and_parent_folders(tmp_path):
    write_text(tmp_path / "a" / "b" / "file", "naïve → ok")
    assert (tmp_path / "a" / "b" / "file").read_bytes().decode("utf-8") == "naïve → ok"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_new_file_permissions_follow_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_unwritable_path_raises_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write 'inside'") as error:
        write_text(tmp_path / "file" / "inside", "")
    assert error.value.location == str(tmp_path / "file") and error.value.hint
