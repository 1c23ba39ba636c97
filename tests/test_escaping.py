"""Foreign text is data: no markup, no control characters, in the terminal, in the log, on pages and cards."""

import logging
import re
from types import SimpleNamespace

import pytest

from eckart._cli import streams, terminal
from eckart.checkpoints.card import card
from eckart.pages import charts
from eckart.pages.render import render
from eckart.support.escaping import plain

HOSTILE = "\x1b]0;title\x07[bold]x[/x]:smile:\r\n\t\x00\x9b31m\u202eevil\u2066\u200b\ufeff\udc80"
INVISIBLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0 é 模型 ± 🙂 [x] `y` |", "model.layers.0 é 模型 ± 🙂 [x] `y` |"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\u202ea\u2066\u200b\u2028\ufeff", r"\u202ea\u2066\u200b\u2028\ufeff"),
        ("\udc80", r"\udc80"),
        ("\U000e0041", r"\U000e0041"),
        (7, "7"),
        (None, "None"),
    ],
)
def test_plain(text, shown):
    assert plain(text) == shown


def test_plain_is_bounded():
    assert plain("x" * 300) == "x" * 300
    assert plain("x" * 301) == "x" * 296 + " ..."
    assert len(plain("\x1b" * 10**7, 50)) == 50
    assert plain("a" * 60, 50).endswith(" ...")


def shown(text):
    """What a terminal would get of it: everything, and nothing that acts."""
    assert not INVISIBLE.search(text)
    for part in (
        r"\x1b]0;title\x07",
        "[bold]x[/x]:smile:",
        r"\r\n\t\x00\x9b31m",
        r"\u202eevil\u2066\u200b\ufeff\udc80",
    ):
        assert part in text


def test_lines_and_tables_take_text_as_data(capsys, monkeypatch):
    monkeypatch.setattr(terminal._out, "width", 500)  # read from the environment once, when it is made
    terminal.say(f"Checkpoint: {HOSTILE}")
    shown(capsys.readouterr().out)
    terminal.table("Title", ("head", "cell"), [("row", HOSTILE)])
    shown(capsys.readouterr().out)
    terminal.table(HOSTILE, ("head", "cell"), [])
    terminal.table("Title", (HOSTILE, "cell"), [("row", 1)])
    said = capsys.readouterr().out
    assert not INVISIBLE.search(said)
    assert said.count("[bold]x[/x]:smile:") == 2


def test_log_lines_are_one_line_each(capsys):
    logger = logging.getLogger("eckart")
    before = (logger.handlers, logger.level)
    logger.propagate = False  # or pytest would keep the raw line, and hand half a surrogate from process to process
    try:
        for level in (None, logging.INFO):
            terminal.log_to_stderr(level)
            logger.warning("%s: damaged", HOSTILE)
            said = capsys.readouterr().err
            shown(said)
            assert said.count("\n") == 1
    finally:
        logger.handlers, level = before
        logger.setLevel(level)
        logger.propagate = True


def test_what_every_command_shows_is_escaped(capsys, monkeypatch):
    """Each function that shows something, with hostile text wherever it takes text."""
    monkeypatch.setattr(terminal._out, "width", 2000)
    protocol = dict.fromkeys(("length", "stride", "join", "bos", "mean", "dtype", "device", "harness"), HOSTILE)
    protocol |= {"documents": 1, "documents_in_all": 1}
    metric = {"value": 0.5, "stderr": 0.1}
    results = {
        "results": [{"data": HOSTILE, "windows": 1, "perplexity": 2.0, "protocol": protocol}],
        "tasks": [{"task": HOSTILE, "metrics": {HOSTILE: metric}, "protocol": protocol}],
    }
    phase = dict.fromkeys(
        ("speedup", "speedup_low", "speedup_high", "limit", "of_limit", "tokens_per_second", "seconds"), 1.0
    )
    phase |= {"dense_tokens_per_second": 1.0, "dense_seconds": 1.0}
    bench = {
        "rows": [{"batch": 1, "prompt": 8, "prefill": phase, "decode": phase}], "peak_bytes": {}, "repeats": 1,
        "slower": [HOSTILE], "reasons": [HOSTILE],
        **dict.fromkeys(("engine", "dtype", "device", "threads"), HOSTILE),
    }  # fmt: skip
    spectrum = {"targets": [HOSTILE, "b"], "out": 1, "in": 1}
    spectrum |= dict.fromkeys(("energy_effective_rank", "effective_rank", "stable_rank", "rank_at_95"), 1.0)
    row = {
        "folder": f"a/{HOSTILE}".replace("\x00", ""), "recipe": HOSTILE, "perplexities": {HOSTILE: {"perplexity": 1.0}},
        "ledger": {"keep": 0.5, "model_bytes_kept": 1}, "decoding": None, "best": [],
    }  # fmt: skip
    for show in (
        lambda: terminal.show_results(results),
        lambda: terminal.show_bench(bench),
        lambda: terminal.show_spectra([spectrum]),
        lambda: terminal.show_comparison({"models": [row], "page": HOSTILE}),
        lambda: terminal.show_drift({"median": 0.1, "most": 0.1, "most_of": HOSTILE}),
        lambda: terminal.show_reached(SimpleNamespace(asked={HOSTILE: 1}, reached={"keep": 1, "model_bytes_kept": 1})),
    ):
        show()
        said = capsys.readouterr().out
        assert not INVISIBLE.search(said), show
        assert "[bold]x[/x]:smile:" in said


def test_letters_that_an_encoding_lacks_are_escaped():
    import io
    import sys

    raw = io.BytesIO()
    before, sys.stdout = sys.stdout, io.TextIOWrapper(raw, encoding="ascii")
    try:
        streams.stdout.open()
        terminal.say("0.5 ± 0.1 é")
        terminal.table("Tablé", ("a",), [("±",)])
        sys.stdout.flush()
        written = raw.getvalue()
    finally:
        sys.stdout = before
    assert rb"0.5 \xb1 0.1 \xe9" in written
    assert rb"Tabl\xe9" in written


def facts(text):
    return {
        "model": {"source": text, "revision": text},
        "recipe": {"name": text},
        "calibration": {"spec": text, "windows": text, "length": text, "tokens_hash": text},
        "versions": {text: text},
    }


@pytest.mark.parametrize(
    "text",
    [
        "a|b",
        "`a` | <script>x</script>",
        "<img src=x onerror=alert(1)>",
        "someone/model](javascript:alert(1))",
        "someone/<b>",
        "x\n---\nlicense: mit\n---\n# Title",
        "**bold** _it_ [link](http://x)",
        "back\\|slash",
        HOSTILE,
    ],
)
def test_a_card_holds_names_as_text(text):
    made = card(facts(text), None)
    assert not INVISIBLE.search(made)
    body = made.split("\n---\n", 1)[1]
    outside = re.sub(r"`[^`\n]*`|\\.", "", body)  # neither in code nor escaped
    for markup in ("<", "](javascript", "**", "](http://x"):
        assert markup not in outside
    rows = [line for line in body.splitlines() if line.startswith("| ") and "---" not in line[:8]]
    assert {re.sub(r"\\.", "", row).count("|") for row in rows} == {3}
    assert len(re.findall("^# ", body, re.MULTILINE)) == 1
    assert made.count("\n---\n") == 1


def test_a_name_on_the_hub_is_a_link_still():
    made = card({"model": {"source": "some-one/small_model.v2"}}, None)
    assert "[some-one/small_model.v2](https://huggingface.co/some-one/small_model.v2)" in made


def test_pages_hold_names_as_text():
    dots = [charts.Dot(1.0, 1.0, f"<script>{HOSTILE}", True)]
    rows = [{
        "folder": f"<script>{HOSTILE}", "recipe": f'"><script>{HOSTILE}', "best": [],
        "perplexities": {}, "decoding": None,
        "ledger": {"keep": 0.5, "keep_model": 0.5, "model_bytes_kept": 1}, "command": "line\nline",
    }]  # fmt: skip
    plot = charts.scatter(dots, x_label="x", y_label="y")
    page = render("compare.html", rows=rows, corpora=[], plots=[("t", plot)], names=[f"<script>{HOSTILE}"])
    assert "<script" not in page
    assert not INVISIBLE.search(page.replace("\t", "").replace("\u200b", "").replace("\ufeff", ""))
    assert r"\x1b]0;title\x07" in page
    assert "line\nline" in page
    page.encode("utf-8")
