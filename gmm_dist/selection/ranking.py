"""Compare finished fits: criteria, ranking, ties, and the warnings for a reader."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from gmm_dist.em.lane import Status
from gmm_dist.em.loop import FitResult
from gmm_dist.em.statistics import Spike, TotalMoments, counts_rows
from gmm_dist.errors import Option, Spelling, Text, Words, in_python, joined, spelt
from gmm_dist.formats import counted
from gmm_dist.model.covariance import TYPE_OF
from gmm_dist.model.criteria import aic, bic, icl, most_components, n_parameters
from gmm_dist.selection.spikes import Profile

_COLUMNS, _K, _WHERE = Option("columns"), Option("n_components"), Option("where")
_REG_COVAR = Option("reg_covar")

CRITERIA = ("bic", "aic", "icl", "holdout")

# A gain in mean log-likelihood (nats per row) that counts as none, a common tol of EM. Where BIC
# charges less for a component, it no longer tells structure from misfit.
_CHEAP = 1e-3
_FEWEST_TO_FALL = 4  # numbers of components needed to say that a criterion keeps falling
_MOST_IN_GRID = 20
_MOST_NOTES = 8  # on features that no Gaussian fits
_EXACT = 2.0**53  # float64 knows every whole number below


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One mixture to be fitted."""

    k: int
    covariance_type: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BestFit:
    """The best of a candidate's fits on all rows; `seconds` from the start to its end.

    `n_starts` starts were fitted on all rows; `n_dropped` of them fell behind and were ended
    early. `passes_saved` is the sum over them (`em.FitResult`).
    """

    fit: FitResult
    seconds: float
    n_starts: int = 1
    n_dropped: int = 0
    passes_saved: float = 0.0

    @classmethod
    def of(cls, fit: FitResult, seconds: float) -> BestFit:
        dropped = int(fit.status is Status.DROPPED)
        return cls(
            fit=fit, seconds=seconds, n_starts=1, n_dropped=dropped, passes_saved=fit.passes_saved
        )

    def counted(self, n_samples: float) -> BestFit:
        """Return the fit of the same rows, with weights that sum to `n_samples`."""
        return replace(self, fit=self.fit.counted(n_samples))

    def against(self, other: BestFit) -> BestFit:
        """Return the better of two, with the counts of both."""
        first, second = (o.fit for o in (self, other))
        better = self.fit
        if (second.is_ranked, second.log_likelihood) > (first.is_ranked, first.log_likelihood):
            better = second
        return BestFit(
            fit=better,
            seconds=max(self.seconds, other.seconds),
            n_starts=self.n_starts + other.n_starts,
            n_dropped=self.n_dropped + other.n_dropped,
            passes_saved=self.passes_saved + other.passes_saved,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RankedCandidate:
    """A candidate, its best fit, and its criteria.

    Of `bic`, `aic` and `icl` (nats) lower is better. `holdout` is the mean log-likelihood of the
    held-out rows (nats per row, higher is better), None where there are none.
    """

    candidate: Candidate
    outcome: BestFit
    n_parameters: int
    bic: float
    aic: float
    icl: float
    holdout: float | None = None

    @classmethod
    def of(
        cls, candidate: Candidate, outcome: BestFit, holdout: float | None = None
    ) -> RankedCandidate:
        """Compute the criteria of a fit."""
        fit = outcome.fit
        n_free = n_parameters(
            candidate.covariance_type, fit.parameters.n_components, fit.parameters.n_features
        )
        own_bic = bic(fit.log_likelihood, n_free, fit.n_samples)
        return cls(
            candidate=candidate,
            outcome=outcome,
            n_parameters=n_free,
            bic=own_bic,
            aic=aic(fit.log_likelihood, n_free),
            icl=icl(own_bic, fit.entropy),
            holdout=holdout,
        )

    @property
    def fit(self) -> FitResult:
        return self.outcome.fit

    @property
    def mean_log_likelihood(self) -> float:
        return self.fit.log_likelihood / self.fit.n_samples

    def value(self, criterion: str) -> float:
        """Return the value to rank by: lower is better for any criterion; NaN if unknown."""
        if criterion == "holdout":
            return math.nan if self.holdout is None else -self.holdout
        return float(getattr(self, criterion))


def _rerun_with(k: str) -> Words:
    return "run again with " + _K + f" {k}"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SweepResult:
    """All candidates in the order of the call; `ranked` has the best first, failures last.

    `total` are the moments of the fitted rows, without held-out ones; `n_passes` is the number of
    passes over them that scored lanes. `profile` describes the features by a sample. `centre`
    (d,), in feature units, is the point that moments and profile are about (None: 0). `weight` is
    the sum of the weights where `total` has it in another unit.
    """

    scored: tuple[RankedCandidate, ...]
    criterion: str
    total: TotalMoments
    n_passes: int = 0
    profile: Profile = field(default_factory=Profile)
    centre: Tensor | None = None
    weight: float | None = None

    @property
    def n_samples(self) -> float:
        """The n of the criteria: the sum of the weights, if these count rows (`weighting`)."""
        return self.scored[0].fit.n_samples if self.scored else self.total.n_samples

    @property
    def ranked(self) -> list[RankedCandidate]:
        # Ties: fewer parameters, then smaller k.
        return sorted(
            self.scored,
            key=lambda s: (
                not s.fit.is_ranked,
                s.value(self.criterion),
                s.n_parameters,
                s.candidate.k,
            ),
        )

    @property
    def best(self) -> RankedCandidate | None:
        """The candidate of the lowest criterion, or None when every one failed."""
        first = self.ranked[0]
        return first if first.fit.is_ranked else None

    def warnings(
        self,
        feature_names: Sequence[str],
        rerun: Callable[[str], Words] = _rerun_with,
        *,
        holds_out: bool = True,
        spelling: Spelling = in_python,
    ) -> list[str]:
        """Return notes for a reader of the table, each with its remedy.

        `rerun` turns the next grid of k, such as `2..20` or `2,4,8`, into the words of a remedy;
        `holds_out` says whether rows can be held out; `spelling` spells options.
        No remedy is advised that the table refutes.
        """
        lines: list[Words] = [
            self._constant(j, feature_names[j]) for j in self.total.constant_features()
        ]
        lines += self._shape_notes(feature_names)
        kinds = {s.candidate.covariance_type for s in self.scored}
        read = any(TYPE_OF[kind].has_products for kind in kinds)
        if read and (dependent := self.total.dependent_features()):
            lines.append(
                f"{dependent} of {len(feature_names)} columns are duplicates or sums of others, so "
                "full covariances rest on " + _REG_COVAR + ": leave them out with " + _COLUMNS
            )
        lines += self._weights_note() + self._edge_warning(rerun) + self._falling_note(holds_out)
        return [spelt(line, spelling) for line in lines]

    def _constant(self, feature: int, name: str) -> Words:
        at = 0.0 if self.centre is None else abs(float(self.centre[feature]))
        if at < _EXACT:
            return f"column {name!r} is constant: leave it out with " + _COLUMNS
        return (
            f"column {name!r} is constant as far as float64 tells, which knows numbers near "
            f"{at:.4g} in steps of {math.ulp(at):g}: subtract an offset where it is written, or "
            "leave it out with " + _COLUMNS
        )

    def _shape_notes(self, names: Sequence[str]) -> list[Words]:
        """Return a note on each feature that no Gaussian fits, with its remedy."""
        lines: list[Words] = []
        of_feature: dict[int, list[Spike]] = {}
        for spike in self.profile.spikes:
            of_feature.setdefault(spike.feature, []).append(spike)
        for j, spikes in of_feature.items():
            values = " and ".join(
                f"{s.share:.0%} are exactly {self._spell(j, s.value)}" for s in spikes
            )
            lines.append(
                f"column {names[j]!r}: of its rows {values}, which no Gaussian fits: a component "
                "there is as narrow as "
                + _REG_COVAR
                + " lets it be, and takes likelihood from that; "
                + self._way_out(spikes)
                + ("raise " + _REG_COVAR + ", or leave the column out with " + _COLUMNS)
            )
        if any(s.fit.status in (Status.DEGENERATE, Status.COLLAPSED) for s in self.scored):
            lines += [
                f"column {names[r.feature]!r} is rounded to {r.n_values:,} values "
                f"({r.share:.0%} of a sample are {self._spell(r.feature, r.value)}): components "
                "that lie on one are degenerate; raise "
                + _REG_COVAR
                + (", filter with " + _WHERE + ", or leave the column out with " + _COLUMNS)
                for r in self.profile.rounded
            ]
        lines += [
            f"column {names[f.feature]!r} has values as far out as "
            f"{self._spell(f.feature, f.farthest)}, but half of its rows within {f.width:.3g}: "
            + _REG_COVAR
            + ", in units of the whole column's variance, drowns them; filter far values with "
            + (_WHERE + ", or lower " + _REG_COVAR)
            for f in self.profile.dwarfed
        ]
        return _some(lines)

    def _way_out(self, spikes: Sequence[Spike]) -> Words:
        """Return how to leave out the rows of spikes, if others are left.

        A filter cannot tell rows whose value has been filled in.
        """
        if sum(spike.share for spike in spikes) > 1 - 1e-9:
            return ""
        j = spikes[0].feature
        near = 1e-9 * float(self.total.scale[j])
        if any(abs(spike.value - float(self.total.mean[j])) <= near for spike in spikes):
            mean, drop = Option("missing", "mean"), Option("missing", "drop")
            return "that is the column's mean: where " + mean + " filled it in, try " + drop + ", "
        return "filter such rows with " + _WHERE + ", "

    def _spell(self, feature: int, value: float) -> str:
        """Spell a value about the centre in feature units, without the centre's rounding."""
        if self.centre is None:
            return f"{value:.6g}"
        uncentred = float(self.centre[feature]) + value
        return f"{0.0 if abs(uncentred) < 1e-6 * abs(value) else uncentred:.6g}"

    def _weights_note(self) -> list[Words]:
        """Return a note where the criteria use another n than the sum of the weights."""
        weight, n_rows = self.weight, self.total.n_rows
        weight = self.total.n_samples if weight is None else weight
        if counts_rows(weight, n_rows):
            return []
        summed = f"{weight:.3g}" if weight < math.inf else "more than float64 holds"
        return [
            f"the weights sum to {summed} over {counted(n_rows, 'row')}, so "
            f"they do not count rows: the criteria take n = (Σw)²/Σw² = {self.n_samples:,.1f}; "
            "weights of mean 1 would count each row as one"
        ]

    def _edge_warning(self, rerun: Callable[[str], Words]) -> list[Words]:
        ks = sorted({s.candidate.k for s in self.scored})
        if self.best is None or len(ks) == 1:
            return []
        k, kind = self.best.candidate.k, self.best.candidate.covariance_type
        most = most_components(kind, self.total.n_rows, len(self.total.sum_x))
        if k == ks[-1] and k < most:
            return [
                "the best k is the largest tried: " + Text.of(rerun(_grid(k, min(2 * k, most))))
            ]
        if k == ks[0] and k > 1:
            return ["the best k is the smallest tried: " + Text.of(rerun(_grid(1, k)))]
        return []

    def _falling_note(self, holds_out: bool) -> list[Words]:
        """Return a note where BIC keeps falling because the rows outweigh its penalty."""
        best, largest = self.best, max(s.candidate.k for s in self.scored)
        if self.criterion not in ("bic", "aic") or best is None or best.candidate.k < largest:
            return []
        kind = best.candidate.covariance_type
        family = [s for s in self.scored if s.fit.is_ranked and s.candidate.covariance_type == kind]
        family.sort(key=lambda s: s.candidate.k)
        if len(family) < _FEWEST_TO_FALL:
            return []
        before = family[-2]
        cost = self._cost(before, best)
        if cost > _CHEAP:
            return []
        rise = best.mean_log_likelihood - before.mean_log_likelihood
        gain = rise / (best.candidate.k - before.candidate.k)
        return [
            f"{self.criterion.upper()} still falls at k={largest}: with {self.total.n_rows:,} rows "
            f"a component costs it only {cost:.1g} nats per row, and the last one gained "
            f"{gain:.2g}, so it may never rise; " + self._advice(largest, holds_out)
        ]

    def _advice(self, largest: int, holds_out: bool) -> Words:
        """Advise criteria that, by this table, are not also best at its largest k."""
        alternatives: list[Words] = []
        refuted = []
        for criterion in ("bic", "icl", "holdout"):
            if criterion == self.criterion:
                continue
            if (best := self._best_by(criterion)) is not None:
                if best.candidate.k < largest:
                    best_at = f" (best at k={best.candidate.k})"
                    alternatives.append(Option("criterion", criterion) + best_at)
                else:
                    refuted.append(criterion)
        if holds_out and self._best_by("holdout") is None:
            alternatives.append(Option("holdout", 0.1) + " " + Option("criterion", "holdout"))
        if alternatives:
            return "consider " + joined(" or ", alternatives)
        refuted_names = " and ".join(
            "the held-out log-likelihood" if name == "holdout" else name.upper() for name in refuted
        )
        verb = "is" if len(refuted) == 1 else "are"
        return f"{refuted_names} {verb} best there, too: choose as many components as are of use"

    def _best_by(self, criterion: str) -> RankedCandidate | None:
        """Return the best by another criterion; None where no candidate has it."""
        measured = [s for s in self.scored if not math.isnan(s.value(criterion))]
        return replace(self, scored=tuple(measured), criterion=criterion).best if measured else None

    def _cost(self, before: RankedCandidate, last: RankedCandidate) -> float:
        """Return the criterion's penalty for one more component, in nats per row."""
        n_free = (last.n_parameters - before.n_parameters) / (last.candidate.k - before.candidate.k)
        each = math.log(self.n_samples) / 2 if self.criterion == "bic" else 1.0
        return n_free * each / self.n_samples


def _some(lines: list[Words]) -> list[Words]:
    """Return the first lines, and how many more there are."""
    if len(lines) <= _MOST_NOTES:
        return lines
    return [*lines[:_MOST_NOTES], f"{len(lines) - _MOST_NOTES} more columns are like these"]


def _grid(first: int, last: int) -> str:
    """Spell the numbers from first to last as a range; of many, evenly spaced ones."""
    n = last - first
    if n <= _MOST_IN_GRID:
        return f"{first}..{last}"
    steps = _MOST_IN_GRID // 2
    return ",".join(str(first + round(n * i / steps)) for i in range(steps + 1))
