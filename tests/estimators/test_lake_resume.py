"""A fit to a lake that was broken off goes on from its output, to the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import here
import lakes
import numpy as np
import pytest

from gmm_dist import BayesianGaussianMixture, GaussianMixture, Lake, UserError, load, save
from gmm_dist.em import loop
from gmm_dist.estimators import bayesian_gaussian_mixture
from gmm_dist.fitting import lake_sweep
from gmm_dist.fitting.checkpoints import FitCheckpoints
from gmm_dist.runs.checkpoint import checkpoint_names
from gmm_dist.runs.folder import Folder
from gmm_dist.selection import starts as starting
from gmm_dist.selection import sweep

SETTINGS: dict[str, Any] = {"n_components": 3, "n_init": 1, "random_state": 3, "max_iter": 12}
POSTERIORS = [
    ("full", "dirichlet_process"),
    ("tied", "dirichlet_distribution"),
    ("diag", "dirichlet_process"),
    ("spherical", "dirichlet_distribution"),
]


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold rows in this process, and search once; most fits here end at `max_iter`."""
    monkeypatch.setattr(lake_sweep, "session", here.session)
    starts: dict[str, Any] = {}

    def find_starts(shards, candidates, config, start, *given, done=None, **options):
        key = f"{candidates} {config} {start}"
        if key not in starts:
            starts[key] = starting.find_starts(shards, candidates, config, start, *given, **options)
        for i, found in enumerate(starts[key] if done else ()):
            done(i, found)
        return starts[key]

    for module in (bayesian_gaussian_mixture, sweep):
        monkeypatch.setattr(module, "find_starts", find_starts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    X = (
        lakes.numbers(900).reshape(300, 3)
        + 4 * lakes.numbers(9, 1).reshape(3, 3)[np.arange(300) % 3]
    )
    columns = {name: X[:, j] for j, name in enumerate("xyz")} | {"w": np.arange(300) % 3 + 0.5}
    lakes.write(tmp_path / "lake" / "a.parquet", columns, rows_per_group=50)
    return Lake(tmp_path / "lake", columns=["x", "y", "z"], weight_column="w")


@contextmanager
def stopped_after(number: int) -> Iterator[None]:
    """Break the fit off when the checkpoint of this pass has been kept."""
    keep = FitCheckpoints.keep

    def keep_and_stop(self: FitCheckpoints, at: int, snapshot: Any) -> None:
        keep(self, at, snapshot)
        if at == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitCheckpoints, "keep", keep_and_stop)
        try:
            yield
        except KeyboardInterrupt:
            return
    raise AssertionError(f"the fit has ended before pass {number}")


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count the passes of EM over all rows, and the searches for starts."""
    counts = {"passes": 0, "searches": 0}

    def counted(name: str, what: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            counts[name] += 1
            return what(*given, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in (bayesian_gaussian_mixture, sweep):
            patch.setattr(module, "find_starts", counted("searches", module.find_starts))
        keep = FitCheckpoints.keep

        def counted_keep(self: FitCheckpoints, number: int, snapshot: Any) -> None:
            counts["passes"] += number > 0  # the search keeps what it has under 0
            keep(self, number, snapshot)

        patch.setattr(FitCheckpoints, "keep", counted_keep)
        yield counts


def learned(model: Any) -> dict[str, Any]:
    """Return all attributes that a fit has set, arrays as their dtype and bytes."""
    names = [name for name in vars(model) if name.endswith("_")]
    found = {name: getattr(model, name) for name in [*names, "_n_samples", "_log_likelihood"]}
    return {name: exactly(value) for name, value in found.items()}


def exactly(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(exactly(part) for part in value)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    if isinstance(value, np.ndarray | np.generic | float):
        array = np.asarray(value)
        return str(array.dtype), array.shape, array.tobytes()
    return [exactly(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("kind", "weights"), POSTERIORS)
def test_a_posterior_that_was_broken_off_ends_with_the_same_bits(kind, weights, lake, tmp_path):
    def model() -> BayesianGaussianMixture:
        return BayesianGaussianMixture(
            **SETTINGS, covariance_type=kind, weight_concentration_prior_type=weights
        )

    with counting() as whole:
        expected = learned(model().fit(lake, output=tmp_path / "whole"))
    # Among the starts of all sizes, when the best of them are chosen, and with those alone.
    for at in (2, 3, whole["passes"]):
        out = tmp_path / f"stopped-{at}"
        with stopped_after(at):
            model().fit(lake, output=out)
        assert checkpoint_names(Folder.of(str(out)))
        with counting() as rest:
            resumed = model().fit(lake, output=out, resume=True)
        assert learned(resumed) == expected
        assert rest == {"passes": whole["passes"] - at, "searches": 0}
        assert not checkpoint_names(Folder.of(str(out)))


def test_a_mixture_that_was_broken_off_ends_with_the_same_bits(lake, tmp_path):
    model = GaussianMixture(**SETTINGS, tol=0.0)
    with counting() as whole:
        expected = learned(model.fit(lake, output=tmp_path / "whole"))
    with stopped_after(5):
        model.fit(lake, output=tmp_path / "stopped")
    resumed = GaussianMixture(**SETTINGS, tol=0.0)
    with counting() as rest:
        resumed.fit(lake, output=tmp_path / "stopped", resume=True)
    assert learned(resumed) == expected
    assert rest == {"passes": whole["passes"] - 5, "searches": 0}


def test_a_seed_that_was_drawn_is_kept(lake, tmp_path):
    """Else a search that follows the checkpoint would draw other numbers than before."""
    seeds = []

    def noted(*given, **options):
        seeds.append(given[3].random_state)
        return sweep.sweep(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lake_sweep, "sweep", noted)
        for at in (2, 3):
            with stopped_after(at):
                model = GaussianMixture(**SETTINGS | {"random_state": None}, tol=0.0)
                model.fit(lake, output=tmp_path / "out", resume=at > 2)
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("estimator", [BayesianGaussianMixture, GaussianMixture])
def test_what_lies_in_the_output_of_a_fit_that_has_ended(estimator, lake, tmp_path, monkeypatch):
    out = tmp_path / "out"
    model = estimator(**SETTINGS).fit(lake, output=out)
    mixture = load(out)
    for name in ("weights", "means", "covariances"):
        assert (getattr(mixture.parameters, name).numpy() == getattr(model, f"{name}_")).all()
    assert mixture.feature_names == ("x", "y", "z")
    saved = load(save(model.to_mixture(), tmp_path / "saved"))
    assert saved.parameters.means.equal(mixture.parameters.means)
    assert mixture.n_samples == model._n_samples
    with pytest.raises(UserError, match=r"holds a result|committed"):
        estimator(**SETTINGS).fit(lake, output=out)
    with pytest.raises(UserError, match=r"keeps another fit: the settings differ: max_iter was 12"):
        estimator(**SETTINGS | {"max_iter": 13}).fit(lake, output=out, resume=True)
    # Neither rows nor Ray are needed to learn what is kept.
    monkeypatch.setattr(loop, "task_of", None)
    monkeypatch.setattr(lake_sweep, "session", None)
    again = estimator(**SETTINGS)
    again.stale_ = 1
    assert learned(again.fit(lake, output=out, resume=True)) == learned(model)


def test_other_rows_settings_and_starts_are_refused(lake, tmp_path):
    out, settings = tmp_path / "out", {**SETTINGS, "warm_start": True}
    first = BayesianGaussianMixture(**settings).set_params(max_iter=1).fit(lake)
    first.set_params(max_iter=12)
    with stopped_after(1):
        first.fit(lake, output=out)
    with pytest.raises(UserError, match="holds the checkpoints of an unfinished run"):
        first.fit(lake, output=out)
    with pytest.raises(UserError, match=r"cannot resume .* the settings differ: start was"):
        BayesianGaussianMixture(**settings).fit(lake, output=out, resume=True)
    other = Lake(lake.url, columns=lake.columns, weight_column="w", where="x > 0")
    with pytest.raises(UserError, match=r"cannot resume .* where was null, is "):
        first.fit(other, output=out, resume=True)
    first.set_params(covariance_prior=np.eye(3))
    with pytest.raises(UserError, match=r"cannot resume .* covariance_prior was null"):
        first.fit(lake, output=out, resume=True)
    first.set_params(covariance_prior=None, verbose=1)
    assert first.fit(lake, output=out, resume=True).n_iter_ > 1


def test_what_is_kept_of_a_lake_alone():
    X = lakes.numbers(30).reshape(10, 3)
    for options in ({"output": "out"}, {"resume": True}):
        with pytest.raises(ValueError, match="output and resume are for a lake"):
            GaussianMixture(1).fit(X, **options)
    with pytest.raises(ValueError, match="give output="):
        GaussianMixture(1).fit(Lake("nowhere"), resume=True)
    with pytest.raises(UserError, match=r"output is 3: give a path or URL"):
        GaussianMixture(1).fit(Lake("nowhere"), output=3)
