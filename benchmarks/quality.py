"""Hold our default fits to scikit-learn's, and to the best likelihood ever seen.

python benchmarks/quality.py --json quality.jsonl
python benchmarks/quality.py --skip-peers --datasets weather overlap4
python benchmarks/quality.py --ablate --datasets overlap4
python benchmarks/quality.py --hunt --hunt-seconds 300

Each K is fitted on its own with the default settings, from several seeds; one more line has the
whole grid as one sweep. Ours run on one single-threaded process per core, which hold the rows
(float32) when the clock starts; scikit-learn gets the same values in float64 and as many threads.
All fits are scored by one float64 formula on all rows. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import numpy.typing as npt
import torch
from datasets import QUALITY
from problems import Mixture, mean_log_likelihood
from processes import Loader, ProcessShards

from gmm_dist.config import ABSOLUTE, EMConfig, StartConfig
from gmm_dist.em.estep import EStep, SumMoments
from gmm_dist.lake.deal import default_shards
from gmm_dist.model.parameters import Parameters
from gmm_dist.selection.ranking import Candidate, RankedCandidate
from gmm_dist.selection.sweep import sweep
from gmm_dist.shards.protocol import Jobs, S, Shards, Task

Rows = npt.NDArray[np.float32]

BEST_SEEN = Path(__file__).parent / "best_seen.json"
BELOW_PEER, BELOW_BEST, TIMES_FASTER = 1e-3, 5e-3, 40.0
"""The aims: nats per row below n_init=10 and below the best ever seen; and how much faster."""

_DEFAULT = EMConfig(reg_unit=ABSOLUTE)
"""Ours, but for the variances: to all of them scikit-learn adds 1e-6, whatever their unit.

A component on rounded values is as likely as this lets it be, so all contenders get the same.
"""

ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What each changes in EMConfig and in StartConfig.
    "defaults": ({}, {}),
    "one restart, no moves": ({}, {"n_init": 1, "moves": 0, "finalists": 1}),
    "no moves": ({}, {"moves": 0}),
    "one finalist": ({}, {"finalists": 1}),
    "n_init=48": ({}, {"n_init": 48}),
    "seeds by k-means||": ({}, {"init": "k-means||"}),
    "no leaps": ({"accelerate": False}, {}),
    "tol=1e-3": ({"tol": 1e-3}, {}),
    "tol=1e-3, no leaps": ({"tol": 1e-3, "accelerate": False}, {}),
}


@dataclass(frozen=True)
class Fit:
    """One timed fit of one K, scored; `mixture` is None where the program failed.

    `log_likelihood` is the mean per row in nats. `n_iter` are EM iterations on all rows,
    `e_steps` and `passes` our passes over them: those of EM, and all.
    """

    program: str
    settings: str
    k: int
    seconds: float
    status: str
    mixture: Mixture | None = None
    log_likelihood: float = -np.inf
    degenerate: bool = True
    n_iter: int = 0
    e_steps: int = 0
    passes: int = 0

    @property
    def merit(self) -> float:
        """The log-likelihood; -inf for a degenerate fit, whose likelihood means nothing."""
        return -np.inf if self.degenerate else self.log_likelihood

    def result(self) -> dict[str, Any]:
        """Return all but the mixture, as values that JSON can hold."""
        values = {name: value for name, value in vars(self).items() if name != "mixture"}
        return values | {"log_likelihood": self.log_likelihood if self.mixture else None}


class Counted:
    """Shards that count the passes over them: those of EM, and all."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self.e_steps, self.passes = shards, 0, 0

    @property
    def n_shards(self) -> int:
        return self._shards.n_shards

    def run(self, task: Task[S]) -> S:
        self.passes += 1
        self.e_steps += isinstance(task, EStep)
        return self._shards.run(task)

    def jobs(self) -> contextlib.AbstractContextManager[Jobs]:
        return self._shards.jobs()


def scored(fit: Fit, X: Rows, reg_covar: float) -> Fit:
    """Add the log-likelihood of a fit, and whether it is degenerate."""
    if fit.mixture is None:
        return fit
    try:
        value = mean_log_likelihood(fit.mixture, X, rows=len(X))
    except np.linalg.LinAlgError:
        return replace(fit, mixture=None, status="a covariance is not positive definite")
    bad = fit.degenerate or is_degenerate(fit.mixture, len(X), reg_covar)
    return replace(fit, log_likelihood=value, degenerate=bad or not np.isfinite(value))


def is_degenerate(mixture: Mixture, n: int, reg_covar: float) -> bool:
    """Say whether a component has fewer than d + 1 rows or lies on the regularisation floor.

    It lies there when half of its variance in some direction is `reg_covar`. No data set here
    has a direction in which all its rows are flat.
    """
    too_few = n * mixture.weights.min() < mixture.means.shape[1] + 1
    return bool(too_few or np.linalg.eigvalsh(mixture.covariances).min() < 2 * reg_covar)


# -- the programs ---------------------------------------------------------------------------------


@contextlib.contextmanager
def resident(X: Rows) -> Iterator[ProcessShards]:
    """Hold rows in one process per core, loaded and warm."""
    with tempfile.TemporaryDirectory() as folder:
        path, n_shards = Path(folder) / "X.npy", default_shards(len(X))
        np.save(path, X)
        shards = ProcessShards(Loader(path, n_shards), min(machine.n_cores(), n_shards))
        try:
            shards.run(SumMoments(X.shape[1]))
            ours(shards, X, [1], EMConfig(max_iter=1), StartConfig(n_init=1))
            yield shards
        finally:
            shards.close()


def ours(
    shards: Shards,
    X: Rows,
    ks: Sequence[int],
    config: EMConfig,
    start: StartConfig,
    *,
    settings: str = "defaults",
    given: Sequence[Mixture] | None = None,
) -> list[Fit]:
    """Fit one or more K as one sweep; every fit has the seconds and passes of the whole."""
    counted, starts = Counted(shards), None if given is None else [_parameters(m) for m in given]
    candidates = [Candidate(k, "full") for k in ks]
    began = time.perf_counter()
    result = sweep(counted, candidates, config, start, n_features=X.shape[1], initial=starts)
    seconds = time.perf_counter() - began
    name = "ours" if len(ks) == 1 else "ours, one sweep"
    if given is None:
        settings = f"{settings}, random_state={start.random_state}"
    if len(ks) > 1 and given is None:
        settings += f", K={','.join(map(str, ks))} as one sweep"
    fits = [
        _fit_of(one, Fit(name, settings, one.candidate.k, seconds, "")) for one in result.scored
    ]
    e_steps, passes = counted.e_steps, counted.passes
    fits = [replace(fit, e_steps=e_steps, passes=passes) for fit in fits]
    return [scored(fit, X, config.reg_covar) for fit in fits]


def _fit_of(one: RankedCandidate, blank: Fit) -> Fit:
    p, fit = one.fit.parameters, one.fit
    mixture = Mixture(p.weights.numpy(), p.means.numpy(), p.covariances.numpy())
    return replace(
        blank,
        status=fit.status.name,
        mixture=mixture,
        degenerate=not fit.is_ranked,
        n_iter=fit.n_iter,
    )


def _parameters(mixture: Mixture) -> Parameters:
    weights, means, covariances = (torch.from_numpy(v) for v in vars(mixture).values())
    return Parameters(weights=weights, means=means, covariances=covariances, covariance_type="full")


def scikit_learn(X: Rows, k: int, start: Mixture | None = None, **settings: Any) -> Fit:
    """Fit scikit-learn's GaussianMixture, all other settings its defaults, in float64."""
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    label = ", ".join(f"{name}={value}" for name, value in settings.items())
    if start is not None:
        label = f"from {label}"
        settings |= {"weights_init": start.weights, "means_init": start.means}
        settings["precisions_init"] = np.linalg.inv(start.covariances)
    model, rows = GaussianMixture(k, **settings), X.astype(np.float64)
    with threadpool_limits(machine.n_cores()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged within max_iter: said by the status
        began, status = time.perf_counter(), ""
        try:
            model.fit(rows)
        except ValueError as error:  # a covariance that is not positive definite
            status = str(error).splitlines()[0]
        seconds = time.perf_counter() - began
    fit = Fit("scikit-learn", label, k, seconds, status)
    if status:
        return fit
    mixture = Mixture(model.weights_, model.means_, model.covariances_)
    status = "CONVERGED" if model.converged_ else "MAX_ITER"
    fit = replace(fit, status=status, mixture=mixture, degenerate=False, n_iter=model.n_iter_)
    return scored(fit, X, model.reg_covar)


# -- the best ever seen ---------------------------------------------------------------------------


@dataclass
class BestSeen:
    """The best likelihood seen for each (data set, K), of fits that are not degenerate.

    Each data set is known by its size and by the likelihood of one Gaussian: what was seen on
    other rows of the same name is forgotten.
    """

    path: Path | None
    seen: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None) -> BestSeen:
        exists = path is not None and path.exists()
        return cls(path, json.loads(path.read_text()) if exists and path else {})

    def open(self, name: str, X: Rows) -> None:
        """Make room for a data set, and check that its rows are those seen before."""
        own = {"rows": len(X), "features": X.shape[1], "one_gaussian": _one_gaussian(X)}
        known = self.seen.get(name)
        if known is not None and (
            [known["rows"], known["features"]] == [own["rows"], own["features"]]
            and abs(known["one_gaussian"] - own["one_gaussian"]) < 1e-6
        ):
            return
        if known is not None:
            print(f"note: {name} has other rows than those in {self.path}: forgotten")
        self.seen[name] = own | {"best": {}}

    def value(self, name: str, k: int) -> float:
        """Return the best mean log-likelihood per row, nats; -inf when none was seen."""
        best = self.seen[name]["best"].get(str(k))
        return -np.inf if best is None else float(best["log_likelihood"])

    def offer(self, name: str, fit: Fit) -> bool:
        """Keep a fit that is better than the best, and write the file."""
        if not fit.merit > self.value(name, fit.k) + 1e-7:
            return False
        package = "gmm_dist" if fit.program.startswith("ours") else fit.program
        self.seen[name]["best"][str(fit.k)] = {
            "log_likelihood": fit.log_likelihood,
            "found_by": f"{package} {_version(package)}",
            "settings": fit.settings,
            "on": datetime.date.today().isoformat(),
        }
        bests = self.seen[name]["best"]
        self.seen[name]["best"] = {k: bests[k] for k in sorted(bests, key=int)}
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.seen, indent=2, sort_keys=False) + "\n")
            partial.replace(self.path)
        return True


def _one_gaussian(X: Rows) -> float:
    """Return the largest mean log-likelihood of one Gaussian: -½ (ln det 2πΣ + d)."""
    covariance = np.cov(X.T.astype(np.float64), bias=True)
    return float(-0.5 * (np.linalg.slogdet(2 * np.pi * covariance)[1] + len(covariance)))


def _version(package: str) -> str:
    import gmm_dist

    own = {"gmm_dist": gmm_dist.__version__}
    return str((machine.description()["versions"] | own).get(package, "?"))


# -- the comparison -------------------------------------------------------------------------------


@dataclass
class Contest:
    """All fits of one (data set, K)."""

    data_set: str
    k: int
    ours: list[Fit]
    peers: dict[int, Fit]
    best: float

    @property
    def median(self) -> float:
        return statistics.median_low(fit.merit for fit in self.ours)

    @property
    def worst(self) -> float:
        return min(fit.merit for fit in self.ours)

    @property
    def seconds(self) -> float:
        return statistics.median(fit.seconds for fit in self.ours)

    @property
    def ratio(self) -> float | None:
        return self.peers[10].seconds / self.seconds if 10 in self.peers else None

    def aims(self, value: float) -> dict[str, bool]:
        """Return which aims a likelihood of ours reaches; one that cannot be judged is absent."""
        aims = {}
        if 10 in self.peers and not self.peers[10].degenerate:
            aims["n_init=10"] = value >= self.peers[10].merit - BELOW_PEER
        if np.isfinite(self.best):
            aims["best"] = value >= self.best - BELOW_BEST
        if self.ratio is not None:
            aims["time"] = self.ratio >= TIMES_FASTER
        return aims

    def row(self) -> str:
        missed = [aim for aim, reached in self.aims(self.median).items() if not reached]
        peers = [self.peers.get(n_init) for n_init in (1, 10)]
        cells = [
            f"{self.data_set} | {self.k} | {_nats(self.median)} | {_nats(self.worst)}",
            *[_peer(peer) for peer in peers],
            _nats(self.best),
            f"{self.seconds:.2f}",
            *["" if peer is None else f"{peer.seconds:.1f}" for peer in peers],
            "" if self.ratio is None else f"{self.ratio:.0f}",
            ", ".join(missed),
        ]
        return "| " + " | ".join(cells) + " |"


_AIMS = {
    "n_init=10": f"at least scikit-learn's n_init=10 - {BELOW_PEER}",
    "best": f"within {BELOW_BEST} of the best ever seen",
    "time": f"in 1/{TIMES_FASTER:.0f} of n_init=10's time",
}


def _nats(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "degenerate"


def _peer(fit: Fit | None) -> str:
    if fit is None:
        return ""
    if fit.mixture is None:
        return f"failed: {fit.status}"
    return f"{fit.log_likelihood:.4f}" + (" (degenerate)" if fit.degenerate else "")


def table(contests: Sequence[Contest]) -> str:
    """Return a Markdown table and a line for each aim: how many (data set, K) reached it."""
    lines = [
        "| data set | K | ours, median seed | worst seed | n_init=1 | n_init=10 | best seen "
        "| ours, s | n_init=1, s | n_init=10, s | times faster than n_init=10 | missed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *[contest.row() for contest in contests],
        "",
        "Mean log-likelihoods in nats per row; n_init: scikit-learn's, all else its defaults.",
    ]
    for aim, text in _AIMS.items():
        medians = [c.aims(c.median)[aim] for c in contests if aim in c.aims(c.median)]
        worst = [c.aims(c.worst)[aim] for c in contests if aim in c.aims(c.worst)]
        if medians:
            counts = f"{sum(medians)} of {len(medians)} (worst seed: {sum(worst)})"
            lines.append(f"{text}: {counts if aim != 'time' else counts.split(' (')[0]}")
    return "\n".join(lines)


def contest(name: str, X: Rows, chosen: argparse.Namespace, report: Report) -> list[Contest]:
    """Fit every K of a data set by ours from each seed, as one sweep, and by the peers."""
    contests, ks = [], _ks(name, chosen)
    with resident(X) as shards:
        for k in ks:
            seeds = [StartConfig(random_state=seed) for seed in range(chosen.repeats)]
            fits = [fit for seed in seeds for fit in ours(shards, X, [k], _DEFAULT, seed)]
            contests.append(Contest(name, k, fits, {}, -np.inf))
        together = ours(shards, X, ks, _DEFAULT, StartConfig()) if len(ks) > 1 else []
    for one in contests:
        if not chosen.skip_peers:
            one.peers = {n: scikit_learn(X, one.k, n_init=n, random_state=0) for n in (1, 10)}
        for fit in [*one.ours, *one.peers.values()]:
            report(name, X, fit)
    for fit in together:
        report(name, X, fit)
    for one in contests:
        one.best = report.best.value(name, one.k)
    if together:
        apart = sum(one.ours[0].seconds for one in contests)
        bounds = ", ".join(f"{fit.k}: {_nats(fit.merit)}" for fit in together)
        print(f"{name}: as one sweep {together[0].seconds:.2f} s, apart {apart:.2f} s; {bounds}")
    return contests


def _ks(name: str, chosen: argparse.Namespace) -> list[int]:
    return list(chosen.k or QUALITY[name].k)


# -- ablation -------------------------------------------------------------------------------------


def ablate(name: str, X: Rows, chosen: argparse.Namespace, report: Report) -> list[str]:
    """Fit every K with each of the `ABLATIONS`; return rows of a table."""
    lines = []
    with resident(X) as shards:
        for k in _ks(name, chosen):
            for label, (em, start) in ABLATIONS.items():
                config = replace(_DEFAULT, **em)
                starts = [StartConfig(random_state=r, **start) for r in range(chosen.repeats)]
                fits = [
                    fit
                    for one in starts
                    for fit in ours(shards, X, [k], config, one, settings=label)
                ]
                for fit in fits:
                    report(name, X, fit)
                lines.append(_ablated(name, label, fits, report.best.value(name, k)))
                print(lines[-1], flush=True)
    return lines


def _ablated(name: str, label: str, fits: Sequence[Fit], best: float) -> str:
    median: Callable[[str], float] = lambda key: statistics.median(  # noqa: E731
        getattr(fit, key) for fit in fits
    )
    merits = [fit.merit for fit in fits]
    below = f"{best - statistics.median_low(merits):.4f} | {best - min(merits):.4f}"
    counts = f"{median('e_steps'):.0f} | {median('passes'):.0f} | {median('seconds'):.2f}"
    return f"| {name} | {fits[0].k} | {label} | {counts} | {below} |"


_ABLATED = (
    "| data set | K | settings | passes of EM | passes | seconds | below the best seen "
    "| worst seed |\n|---|---|---|---|---|---|---|---|"
)


# -- the hunt for better --------------------------------------------------------------------------


def hunt(name: str, X: Rows, chosen: argparse.Namespace, report: Report) -> None:
    """Search long for the best mixture of every K, and note it.

    Takes turns: many restarts of ours from a new seed; scikit-learn from a new seed, taken
    further by ours; and moves of a component of the best so far to where another is split.
    """
    with resident(X) as shards:
        for k in _ks(name, chosen):
            before, best = report.best.value(name, k), None
            until, turn = time.monotonic() + chosen.hunt_seconds, 0
            while turn < 2 or time.monotonic() < until:
                for fit in _turn(shards, X, k, turn, best, peers=not chosen.skip_peers):
                    report(name, X, fit)
                    best = fit if best is None or fit.merit > best.merit else best
                turn += 1
            if best is not None and not best.degenerate:
                for fit in _polished(shards, X, best, peers=not chosen.skip_peers):
                    report(name, X, fit)
            now = report.best.value(name, k)
            print(f"{name} K={k}: {turn} turns, {_nats(before)} -> {_nats(now)}", flush=True)


_FINE = replace(_DEFAULT, max_iter=300)
_FINEST = replace(_DEFAULT, tol=1e-8, max_iter=3000, precision="float64")


def _turn(
    shards: Shards, X: Rows, k: int, turn: int, best: Fit | None, *, peers: bool
) -> list[Fit]:
    if turn % 6 == 1 and peers:
        peer = scikit_learn(X, k, random_state=turn)
        if peer.degenerate or peer.mixture is None:
            return []
        label = f"from scikit-learn's random_state={turn}, tol=1e-5"
        return [
            peer,
            *ours(shards, X, [k], _FINE, StartConfig(), settings=label, given=[peer.mixture]),
        ]
    if turn % 6 == 0 or best is None or best.mixture is None or best.degenerate or k < 3:
        start = StartConfig(n_init=32, random_state=turn)
        return ours(shards, X, [k], _FINE, start, settings="n_init=32, tol=1e-5")
    rng = np.random.default_rng(turn)
    moved = [_moved(best.mixture, rng) for _ in range(8)]
    label = "a component moved, tol=1e-5"
    return ours(shards, X, [k] * len(moved), _FINE, StartConfig(), settings=label, given=moved)


def _moved(mixture: Mixture, rng: np.random.Generator) -> Mixture:
    """Return the mixture without one component and with another in two, along its long axis."""
    gone, split = rng.choice(len(mixture.weights), size=2, replace=False)
    weights, means, covariances = (value.copy() for value in vars(mixture).values())
    variances, axes = np.linalg.eigh(covariances[split])
    axis = axes[:, rng.choice(len(variances), p=variances / variances.sum())]
    step = 0.5 * np.sqrt(axis @ covariances[split] @ axis) * axis
    means[gone], means[split] = means[split] + step, means[split] - step
    covariances[gone] = covariances[split]
    weights[gone] = weights[split] = weights[split] / 2
    return Mixture(weights / weights.sum(), means, covariances)


def _polished(shards: Shards, X: Rows, best: Fit, *, peers: bool) -> list[Fit]:
    assert best.mixture is not None
    label, given = f"{best.settings}, then tol=1e-8", [best.mixture]
    fits = ours(shards, X, [best.k], _FINEST, StartConfig(), settings=label, given=given)
    if peers and fits[0].mixture is not None:
        fits.append(scikit_learn(X, best.k, fits[0].mixture, tol=1e-8, max_iter=100))
    return fits


# -- the command ----------------------------------------------------------------------------------


@dataclass
class Report:
    """Takes every fit: to the best seen, and as a line of JSON where asked for."""

    best: BestSeen
    mode: str
    path: Path | None
    on: dict[str, Any]

    def __call__(self, name: str, X: Rows, fit: Fit) -> None:
        better = self.best.offer(name, fit)
        if self.path is None:
            return
        what = {"benchmark": "quality", "mode": self.mode, "data_set": name}
        shape = {"n": X.shape[0], "d": X.shape[1]}
        result = what | shape | fit.result() | {"best_ever": better, "machine": self.on}
        machine.append(result, self.path)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", default=list(QUALITY), choices=list(QUALITY))
    parser.add_argument("--k", nargs="+", type=int, help="instead of each data set's own")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of ours (default 3)")
    parser.add_argument("--skip-peers", action="store_true", help="only ours and the best seen")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ablate", action="store_true", help="ours with parts switched off")
    mode.add_argument("--hunt", action="store_true", help="search long for better likelihoods")
    parser.add_argument(
        "--hunt-seconds", type=float, default=120.0, help="for each K (default 120)"
    )
    parser.add_argument("--rows", type=int, help="a sample of this many rows, to try things out")
    parser.add_argument(
        "--best", type=Path, help=f"file of the best seen (default {BEST_SEEN.name}; none: --rows)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results to this file")
    return parser


def main() -> int:
    chosen = options().parse_args()
    torch.set_num_threads(1)  # as the jobs' driver does
    mode = "ablate" if chosen.ablate else "hunt" if chosen.hunt else "compare"
    best = BestSeen.load(chosen.best or (None if chosen.rows else BEST_SEEN))
    report, contests = Report(best, mode, chosen.json, machine.description()), []
    print(f"{report.on['cpu']}, {report.on['cores']} cores, {report.on['versions']}\n")
    if chosen.ablate:
        print(_ABLATED)
    for name in chosen.datasets:
        try:
            X = QUALITY[name].rows(chosen.rows)
        except SystemExit as error:  # its package is not installed: the others are still fitted
            print(f"{name}: skipped, {error}")
            continue
        best.open(name, X)
        if chosen.hunt:
            hunt(name, X, chosen, report)
        elif chosen.ablate:
            ablate(name, X, chosen, report)
        else:
            contests += contest(name, X, chosen, report)
    if contests:
        print("\n" + table(contests))
    return 0


if __name__ == "__main__":
    sys.exit(main())
