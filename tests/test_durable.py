"""A file is written completely or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from deltaw.durable import replacing, write_text
from deltaw.errors import UserError


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_and_its_folder_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "file", "naïve → ok")
    assert (tmp_path / "a" / "b" / "file").read_bytes().decode("utf-8") == "naïve → ok"


@pytest.mark.skipif(os.name != "posix", reason="permissions of another kind")
def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_place_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write 'inside'") as refused:
        write_text(tmp_path / "file" / "inside", "")
    assert refused.value.where == str(tmp_path / "file") and refused.value.hint
