"""What jobs do with a report: draw from the rows, commit it with the model, never lose a model."""

from __future__ import annotations

import logging
from pathlib import Path

import mixtures
import pages
import pytest
import torch

from gmm_dist.em.estep import SumMoments
from gmm_dist.fitting.results import sample_of
from gmm_dist.model.mixture import Mixture
from gmm_dist.report import of_fit
from gmm_dist.runs import load
from gmm_dist.selection.ranking import SweepResult
from gmm_dist.shards.local import LocalShards

CONTENT = pages.content([pages.candidate(3, 1)], 2, data="s3://user:secret@lake/points")
MIXTURE = Mixture(parameters=mixtures.parameters("full", 3, 2), feature_names=("x", "y"))


class Best(SweepResult):
    """A sweep with a best candidate, of which only that there is one matters."""

    @property
    def best(self):
        return self


def shards(n: int = 3000) -> tuple[LocalShards, SweepResult]:
    rows = mixtures.shards(mixtures.rows(mixtures.parameters("full", 3, 2), n), (n // 3,))
    return rows, Best(scored=(), criterion="bic", total=rows.run(SumMoments(2)))


def test_the_report_is_committed_copied_and_repaired(tmp_path: Path) -> None:
    out, rows = tmp_path / "out", mixtures.rows(MIXTURE.parameters, 50)
    with load.claim(str(out)) as attempt:
        assert of_fit.write(attempt, CONTENT, MIXTURE, rows, numbers=[4, None, 7])
        attempt.commit()
    html = (out / "report.html").read_text()
    assert "A sample of 50 rows" in html
    assert 'scope="row" class="word">new<' in html
    assert "secret" not in html
    (out / "report.html").unlink()
    assert load.repair(str(out)) == ("report.html",)
    assert (out / "report.html").read_text() == html


def test_a_report_that_cannot_be_drawn_costs_a_line_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with load.claim(str(out)) as attempt:
        assert not of_fit.write(attempt, {"data": "x", "best": None}, MIXTURE)
        attempt.write_json("sweep.json", {})
        attempt.commit()
    assert "report.html could not be drawn and is left out: " in caplog.text
    assert len(caplog.records) == 1
    assert not (out / "report.html").exists()
    assert load.read_report(str(out)) == {}


def test_a_sample_is_of_the_rows_bounded_and_the_same_again() -> None:
    rows, result = shards(20_000)
    one, again = (sample_of(rows, result, 0) for _ in range(2))
    assert one is not None
    assert 1500 < len(one) <= 2000
    assert torch.equal(one, again)
    few, result = shards(900)
    assert len(sample_of(few, result, 0)) == 900


def test_rows_that_cannot_be_read_again_cost_the_picture_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, result = shards()
    wrong = mixtures.shards(mixtures.normal_rows(10, 5))
    with caplog.at_level(logging.WARNING):
        assert sample_of(wrong, result, 0) is None
    assert "the report will have no picture of the rows: " in caplog.text
