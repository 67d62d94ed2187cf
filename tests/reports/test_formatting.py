"""Numbers, names, links and logs as pages show them."""

from __future__ import annotations

import pytest

from fpxbench.counted import counted
from fpxbench.reports import formatting, words
from fpxbench.reports.formatting import code_names, commits, microseconds, number, pretty, printable, whole_lines


def test_numbers_keep_three_digits_and_their_unit() -> None:
    assert [microseconds(us) for us in (0.4567, 812.4, 1238.0, 2.5e6,
                                        None)] == ["0.457 µs", "812 µs", "1.24 ms", "2.50 s", "–"]
    assert [number(value) for value in (0, 12345, 0.00001234, 99.96)] == ["0", "12,300", "1.23e-05", "100.0"]


def test_evidence_has_short_numbers_and_keeps_its_text_and_its_integers() -> None:
    assert pretty(0.040959700261617535) == pretty("0.040959700261617535") == "0.04096"
    assert [pretty(text) for text in ("1.4012984643248171e-45", "-inf", "448.0", "3.10", "2.15.0", "16777217")] == [
        "1.4013e-45", "-inf", "448.0", "3.10", "2.15.0", "16777217"]
    assert pretty({"gain": [0.49970000001, 1e-30],
                   "codes": 16777217}) == '{\n "gain": [\n  0.4997,\n  1e-30\n ],\n "codes": 16777217\n}'
    assert pretty([1.5, [2.000000001, "0.33333333333", "x"]]) == '[1.5, [2.0, "0.33333", "x"]]'


def test_names_in_a_sentence_are_set_as_code_and_the_rest_is_escaped() -> None:
    assert code_names("x on e5m2-row, not e5m2: <b>", ["x", "e5m2", "e5m2-row"]) == \
        "<code>x</code> on <code>e5m2-row</code>, not <code>e5m2</code>: &lt;b&gt;"


@pytest.mark.parametrize("url", ["javascript:alert(1)", "https://github.com/pytorch/pytorch/compare/a<b>...c",
                                 "https://github.com/pytorch/pytorch/compare/aaaaaaa...bbbbbbb/../../evil",
                                 "https://evil.example/compare/aaaaaaa...bbbbbbb"])
def test_what_is_no_range_of_pytorchs_commits_is_no_link(url: str) -> None:
    assert "<a " not in commits(url) and "<b>" not in commits(url)
    assert commits("https://github.com/pytorch/pytorch/compare/aaaaaaa...bbbbbbb").startswith(
        '<a href="https://github.com/pytorch/pytorch/compare/')


def test_a_log_loses_its_colours_and_shows_its_control_characters() -> None:
    assert printable("\x1b[1;31mred\x1b[0m\r\n\x07\tend") == "red\n␇\tend"


def test_a_log_that_lost_its_beginning_begins_with_a_whole_line_and_any_other_is_whole() -> None:
    assert whole_lines("d_module()\n" + "line\n" * 900).startswith("line\n")
    assert whole_lines("first\nlast") == "first\nlast"
    assert whole_lines("x" * 5000) == "x" * 5000


def test_words_lose_a_quote_that_was_opened_before_them_and_keep_their_own() -> None:
    assert words.unquoted("""the supported are ('fp8e4nv', 'fp8e5')")""") == "the supported are ('fp8e4nv', 'fp8e5')"
    assert words.unquoted('raised Error("no such file")') == 'raised Error("no such file")'


def test_a_share_of_the_time_is_never_nothing() -> None:
    assert words.at_least_something("reading would take 0% of the time") == "reading would take under 1% of the time"
    assert words.at_least_something("reading would take 10% of the time") == "reading would take 10% of the time"


def test_what_is_rounded_to_zero_has_no_minus() -> None:
    assert [formatting.signed(value, 2) for value in (-0.001, -0.01, 0.5)] == ["+0.00", "-0.01", "+0.50"]


def test_one_is_no_plural() -> None:
    assert [counted(number, "more case") for number in (0, 1, 2)] == ["0 more cases", "1 more case", "2 more cases"]
