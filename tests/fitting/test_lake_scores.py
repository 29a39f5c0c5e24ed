"""A lake's score and criteria are those of its rows in memory, whatever the shards."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lakes
import mixtures
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import NotFittedError

import gmm_dist
from gmm_dist import Cluster, GaussianMixture, Lake, Mixture, UserError
from gmm_dist.em.evaluate import ScoreSums, SumScores
from gmm_dist.fitting import lake_scores
from gmm_dist.fitting.lake_scores import scores_of_lake
from gmm_dist.lake.deal import RowRange, deal
from gmm_dist.lake.plan import Plan
from gmm_dist.model.covariance import COVARIANCE_TYPES
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Loader

N, D = 500, 3
NAMES = ["a", "b", "c"]


class Here:
    """Stand in for Ray's workers: the same calls, in this process."""

    def __init__(self, loader: Loader, n_shards: int, cluster: Cluster) -> None:
        self.loader, self.n_shards = loader, n_shards

    def replace(self, loader: Loader) -> None:
        self.loader = loader

    def load(self) -> int:
        self.rows = [self.loader(shard) for shard in range(self.n_shards)]
        assert all(block.X.numel() == 0 for rows in self.rows for block in rows.blocks)
        return sum(rows.n_rows for rows in self.rows)

    def run(self, task: Any) -> Any:
        return LocalShards(self.rows).run(task)


@pytest.fixture
def here(monkeypatch):
    """Have a lake's rows scored in this process, three shards at the least."""
    monkeypatch.setattr(lake_scores, "session", lambda *taken: nullcontext(Here(*taken)))
    plan_of = lake_scores.plan_of

    def dealt(lake: Lake) -> Plan:
        plan = plan_of(lake)
        parts = [part for shard in plan.shards for part in shard]
        groups = [RowRange(file=p.file, row_group=p.row_group, start=0, stop=p.stop) for p in parts]
        return replace(plan, shards=deal(groups, 3))

    monkeypatch.setattr(lake_scores, "plan_of", dealt)


def table(seed: int = 0) -> pd.DataFrame:
    """Return rows of three clusters far from the origin, weights, and a column to filter by."""
    X = mixtures.rows(mixtures.parameters("full", 3, D, seed=seed), N, seed=seed).numpy()
    frame = pd.DataFrame(X + np.array([1e6, -50.0, 3.0]), columns=NAMES)
    return frame.assign(w=np.arange(N) % 4, t=np.arange(N))


def written(folder: Path, frame: pd.DataFrame) -> str:
    for part in range(2):
        columns = {name: frame[name].to_numpy()[part::2] for name in frame.columns}
        lakes.write(folder / f"{part}.parquet", columns, rows_per_group=70)
    return str(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_a_lakes_scores_are_those_of_its_rows(kind, dtype, tmp_path, here):
    frame = table().astype(dict.fromkeys(NAMES, dtype))
    lake = Lake(url=written(tmp_path / "lake", frame), columns=NAMES)
    X = frame[NAMES].astype(np.float64)
    model = GaussianMixture(2, covariance_type=kind, random_state=0, reg_covar=1e-3).fit(X)
    for name in ("score", "bic", "aic", "icl"):
        assert getattr(model, name)(lake) == pytest.approx(getattr(model, name)(X), rel=1e-12)
    found = scores_of_lake(lake, model.to_mixture())
    assert found.n_samples == found.n_rows == N
    assert found.bic == pytest.approx(model.to_mixture().bic(X), rel=1e-12)


@pytest.mark.parametrize("unit", [1.0, 2.0**-700, 2.0**980])
def test_weights_are_honoured_in_any_unit(unit, tmp_path, here):
    """An integer weight is a row repeated; weights that do not count rows are taken as Kish's."""
    frame = table()
    given = frame.assign(w=frame["w"] * unit)
    lake = Lake(url=written(tmp_path / "lake", given), columns=NAMES, weight_column="w")
    model = GaussianMixture(2, random_state=0).fit(frame[NAMES])
    rows = frame.loc[frame.index.repeat(frame["w"]), NAMES]
    found = scores_of_lake(lake, model.to_mixture())
    assert found.score == pytest.approx(model.score(rows), rel=1e-12)
    assert found.n_rows == (frame["w"] > 0).sum()
    n = len(rows) if unit == 1 else frame["w"].sum() ** 2 / (frame["w"] ** 2).sum()
    assert found.n_samples == pytest.approx(n, rel=1e-12)
    assert found.bic == pytest.approx(-2 * n * found.score + 19 * np.log(n), rel=1e-12)
    entropy = (found.icl - found.bic) / 2 / n
    per_row = (model.icl(rows) - model.bic(rows)) / 2 / len(rows)
    assert entropy == pytest.approx(per_row, rel=1e-6, abs=1e-12)
    if unit == 1:
        for name in ("bic", "aic", "icl"):
            assert getattr(found, name) == pytest.approx(getattr(model, name)(rows), rel=1e-12)


def test_filters_holes_and_held_out_rows(tmp_path, here):
    frame = table()
    holes = frame.copy()
    holes.loc[::7, "b"] = np.nan
    url = written(tmp_path / "lake", holes)
    model = GaussianMixture(2, random_state=0).fit(frame[NAMES])
    some = frame["t"] >= 100
    kept = holes[some & holes["b"].notna()][NAMES]
    lake = Lake(url=url, columns=NAMES, where="t >= 100", missing="drop")
    assert model.score(lake) == pytest.approx(model.score(kept), rel=1e-12)
    filled = holes[NAMES].fillna({"b": holes["b"].mean()})
    assert model.score(Lake(url=url, missing="mean")) == pytest.approx(
        model.score(filled), rel=1e-12
    )
    with pytest.raises(UserError, match=r"column 'b' is NaN; pass missing=.drop."):
        model.score(Lake(url=url))
    share = scores_of_lake(Lake(url=url, missing="drop", holdout=0.5), model.to_mixture())
    assert 0.3 * N < share.n_rows < 0.7 * N
    with pytest.raises(UserError, match=r"no rows are left of 140 to .* loosen where"):
        model.score(Lake(url=url, columns=NAMES, where="t >= 100 and t < 100", missing="drop"))


def test_the_features_are_found_by_name_or_refused(tmp_path, here):
    frame = table()
    url = written(tmp_path / "lake", frame.assign(z=1.0))
    model = GaussianMixture(2, random_state=0).fit(frame[["c", "a"]])
    assert model.score(Lake(url=url)) == pytest.approx(model.score(frame[["c", "a"]]), rel=1e-12)
    with pytest.raises(UserError, match=r"has 2 features \(a, c\), the .*\(c, a\): give columns="):
        model.score(Lake(url=url, columns=["a", "c"]))
    plain = GaussianMixture(2, random_state=0).fit(frame[["c", "a"]].to_numpy())
    named = Lake(url=url, columns=["c", "a"])
    assert plain.score(named) == pytest.approx(model.score(named), rel=1e-12)
    with pytest.raises(UserError, match=r"has 4 features \(a, b, c, z\), the mixture 2 .*: name"):
        plain.score(Lake(url=url))
    with pytest.raises(UserError, match="'c'"):
        model.score(Lake(url=written(tmp_path / "other", frame[["a", "b"]])))


def test_a_posterior_scores_a_lake_as_it_scores_rows(tmp_path, here):
    frame = table()
    lake = Lake(url=written(tmp_path / "lake", frame), columns=NAMES)
    model = gmm_dist.BayesianGaussianMixture(n_components=2, random_state=0, tol=1.0)
    model.fit(frame[NAMES])
    assert model.score(lake) == pytest.approx(model.score(frame[NAMES]), rel=1e-12)


def test_what_a_lake_is_not_asked():
    X, lake, cluster = table()[NAMES], Lake(url="s3://lake/points"), Cluster(num_workers=2)
    model = GaussianMixture(2, random_state=0).fit(X)
    for estimator in (model, model.to_mixture()):
        for verb in ("predict", "predict_proba", "score_samples"):
            with pytest.raises(TypeError, match=r"^X is a lake, [^\n]*`gmm-dist score`[^\n]*$"):
                getattr(estimator, verb)(lake)
    with pytest.raises(TypeError, match=r"^X is a lake, [^\n]*`gmm-dist score`[^\n]*$"):
        GaussianMixture(2).fit_predict(lake)
    for verb in ("score", "bic", "aic", "icl"):
        with pytest.raises(ValueError, match=r"^cluster is for a lake"):
            getattr(model, verb)(X, cluster=cluster)
        with pytest.raises(TypeError, match=r"^cluster is 2: give"):
            getattr(model, verb)(lake, cluster=2)
        with pytest.raises(NotFittedError):
            getattr(GaussianMixture(), verb)(lake)


def test_sums_are_the_same_however_rows_are_dealt_and_whatever_their_units():
    X = torch.tensor(table()[NAMES].to_numpy())
    mixture = mixtures.parameters("full", 3, D)
    weight = torch.linspace(0.5, 3, N, dtype=torch.float64)
    weight[: N // 2] *= 2.0**-600
    whole = LocalShards.of(X, weight).run(SumScores(mixture))
    parts = [LocalShards.of(X[p], weight[p]).run(SumScores(mixture)) for p in halves(N, 5)]
    empty = ScoreSums(
        log_likelihood=0.0, entropy=0.0, n_samples=0.0, sum_ww=0.0, n_rows=0, unit=1.0
    )
    for order in itertools.permutations([*parts, empty], 3):
        left = [part for part in [*parts, empty] if not any(part is own for own in order)]
        found = order[0] + order[1] + order[2]
        for part in left:
            found = part + found
        assert found.n_rows == N
        assert found.unit == whole.unit
        for name in ("log_likelihood", "entropy", "n_samples", "sum_ww"):
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def halves(n: int, parts: int) -> list[slice]:
    return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def test_on_ray(tmp_path, ray_address):
    frame = table()
    holes = frame.copy()
    holes.loc[::7, "b"] = np.nan
    lake = Lake(url=written(tmp_path / "lake", holes), missing="mean", weight_column="w")
    filled = holes[NAMES].fillna({"b": holes.loc[holes["w"] > 0, "b"].mean()})
    mixture = Mixture(parameters=mixtures.parameters("full", 2, D), feature_names=tuple(NAMES))
    model = GaussianMixture.from_mixture(mixture)
    rows = filled.loc[frame.index.repeat(frame["w"])]
    found = model.icl(lake, cluster=Cluster(ray_address, num_workers=2))
    assert found == pytest.approx(model.icl(rows), rel=1e-12)
