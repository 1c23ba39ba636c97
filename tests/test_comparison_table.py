"""The table of rows compared in pairs: what differs clearly, what does not, and who is ahead."""

import sys
from math import log
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import comparison_table

NOISE = (0.4, -0.4, 0.2, -0.2)  # common to all rows: hard and easy windows


def row(name, level, own=(0.0, 0.0, 0.0, 0.0), keep=0.8):
    losses = [level + common + mine for common, mine in zip(NOISE, own, strict=True)]
    found = {corpus: {"losses": losses, "kl": 0.1} for corpus in comparison_table.CORPORA}
    return {"row": name, "keep": keep, "kind": "training-free", "recipe": {"storage": "pair"}, **found}


def rows(*found):
    return {(one["row"], one["keep"]): one for one in found}


def test_a_margin_is_taken_in_pairs_and_is_positive_for_the_better_one():
    mean, error = comparison_table.margin(row("a", 3.1, (0.01, -0.01, 0.01, -0.01)), row("b", 3.0), "wikitext-2")
    assert mean == pytest.approx(0.1)
    assert error == pytest.approx((4 * 0.01**2 / 3 / 4) ** 0.5)  # the windows' own differences are common to both
    (first, _) = comparison_table.make_margins(rows(row("eckart", 3.0), row("x", 3.1, (0.01, 0, 0, 0))), "eckart")
    assert "eckart at 80% on wikitext-2: ahead of x by 0.103 nats per token" in first


def test_what_differs_by_less_than_two_standard_errors_is_bold_too():
    found = rows(row("best", log(20)), row("near", log(20), (0.3, -0.2, 0.1, -0.1)), row("far", log(30)))
    lines = {line.split(" | ")[0]: line for line in comparison_table.make_comparison(found)}
    assert "**20.00** / **20.00**" in lines["| best"]
    assert "**" in lines["| near"]
    assert "**" not in lines["| far"].replace("| far", "")
