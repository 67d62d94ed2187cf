"""A file is replaced at once: whoever reads it finds the old content or the new one, whole."""

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
