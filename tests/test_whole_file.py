"""A file is replaced at once: whoever reads it finds the old content or the new one, whole."""

import errno
from pathlib import Path

import pytest

from fpxbench.whole_file import write_whole


@pytest.mark.parametrize("content", ["größer als früher\n" * 10_000, b"\x00\xff"])
def test_the_file_holds_the_new_content_and_nothing_else_is_left(tmp_path, content):
    path = tmp_path / "state.json"
    for before in ("", "old"):
        path.write_text(before)
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_stopped_half_way_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    path.write_text("old")
    write_bytes = Path.write_bytes

    def half(self, content):
        write_bytes(self, content[:len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new content")
    assert path.read_text() == "old"


def test_a_failure_names_the_file_that_was_asked_for_and_leaves_no_part(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(tmp_path / "nowhere" / "state.json", "new")
    assert missing.value.filename == str(tmp_path / "nowhere" / "state.json")
    write_bytes = Path.write_bytes

    def full(self, content):
        write_bytes(self, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as no_space:
        write_whole(tmp_path / "state.json", "new")
    assert no_space.value.filename == str(tmp_path / "state.json") and list(tmp_path.iterdir()) == []
