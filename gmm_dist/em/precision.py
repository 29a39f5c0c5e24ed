"""The precision policy: which arithmetic each lane's next pass takes.

A pass takes the fastest form that keeps the digits that matter. Two things can be lost:

- the mean log-likelihood, of which convergence is judged. Its error is measured: on a part of the
  rows, in a lane's first pass and in every fourth, log p in float32 is held against float64. The
  signed errors largely cancel in the mean, so float32 goes on while their mean plus two standard
  errors is below a quarter of tol. A lane that has left float32 for this comes back when that is
  below an eighth.
- a covariance, by cancellation in S/N - μμᵀ. `natural.Natural.condition` bounds by how much
  rounding is amplified in it. A pass whose M-step meets more than its form bears is repeated in a
  better one; the lane comes back when the condition is well below that limit.

A lane of which float32 cannot hold a sum leaves it for good: that shows in no condition, and a lane
that came back to fail again would never have the two passes in one form that tell a gain.

The centred form loses nothing. Where few components matter to a row it is the fastest, the more so
as it need not screen in each pass; the passes that measure float32 count those, too. Where many do
it evaluates all pairs: in compiled loops, on a CPU, that takes no longer than float64's products,
and no longer than float32's where features or components are few. Elsewhere it is the slowest.

On a GPU all this is reckoned with its own prices (`gpu.prices`), the form that screens is another
one, and where float64 products cost what float32's do, `auto` takes no float32.

What a lane is ranked by is always scored in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gmm_dist.config import EMConfig
from gmm_dist.em.gpu import prices
from gmm_dist.em.lane_batch import KEPT, KEPT_ON_GPU, Precision
from gmm_dist.em.statistics import PassStatistics, SufficientStatistics
from gmm_dist.model.covariance import TYPE_OF, CovarianceType
from gmm_dist.model.parameters import Parameters

FORMS = (Precision.FLOAT32, Precision.FLOAT64, Precision.CENTRED)
"""From the one that loses most digits to the one that loses none."""

MAX_CONDITION = {Precision.FLOAT32: 1.7e3, Precision.FLOAT64: 1e7, Precision.CENTRED: math.inf}
"""The largest amplification of rounding (`natural.Natural.condition`) that each form may meet.

2^-24 · 1.7e3 = 1e-4 of a covariance, 2^-53 · 1e7 = 1e-9.
"""

SMALLEST_TOL = 1e-5
"""Gains below it drown in float32's rounding: float64 judges smaller ones."""

_CHECK_PASSES = 4
_CHECKED_ROWS, _CHECK_EVERY = 16_384, 16  # at most so many rows, and one in so many
_BACK = 4.0  # how far below its limit a condition must be before a lane comes back to a form
_STAY = 1.5  # how far above its limit the number of survivors may be in the centred form

# What a row costs, in multiplications and additions of a float32 matrix product: the unit in which
# processors differ least (benchmarks/forms.py). The figures choose between forms, no more.
_FLOAT64 = 2.2  # a pass of float64 products, in passes of float32
# To work on a row at all; to make a feature; a logit's share of the softmax.
_ROW, _FEATURE, _LOGIT = 1000.0, 5.0, 60.0
_JUDGED = 1.15  # what measuring float32, and two passes of float64 in the end, add to its passes


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What the centred form costs: in how many passes the screen, for a component, a survivor."""

    screened: float
    component: float
    pair: float
    per_feature: float
    per_product: float

    def survivor(self, kind: CovarianceType, d: int) -> float:
        products = self.per_product * d * d if kind.has_products else 0.0
        return self.pair + self.per_feature * d + products


# By torch, calls for a component are dealt to the rows of a piece.
_BY_TORCH = _Pairs(
    screened=1.0, component=25.0 + 3e6 / (1 << 14), pair=6e3, per_feature=400.0, per_product=5.0
)
# Most passes try the pairs of earlier ones again, unless rows are so narrow that they are not kept.
_COMPILED = _Pairs(screened=1 / 3, component=55.0, pair=1.5e3, per_feature=50.0, per_product=6.0)
_NARROW = 8
# All pairs in compiled loops: for a row, for a pair, and for its features and their products.
_DENSE_ROW, _DENSE_PAIR = 500.0, 90.0
_DENSE_FEATURE, _DENSE_PRODUCT, _DENSE_APART = 6.0, 2.3, 16.0


def check_every(n_rows: int, float64_price: float = 0.0) -> int:
    """Return of how many rows one has its float32 log-density held against float64.

    Of fewer where float64 is slow, so that the check takes no more of a pass than elsewhere.
    """
    every = _CHECK_EVERY * max(1, round(float64_price / _FLOAT64))
    return max(every, -(-n_rows // _CHECKED_ROWS))


def float32_error(sums: SufficientStatistics, lane: int, whole: PassStatistics) -> float:
    """Return the mean signed error of log p in float32, and two standard errors, nats."""
    if not whole.checked_weight > 0:
        return math.inf
    mean, spread = float(sums.float32_error[lane]), math.sqrt(float(sums.float32_squares[lane]))
    return (abs(mean) + 2 * spread) / whole.checked_weight


def survivors_per_row(
    form: Precision, sums: SufficientStatistics, lane: int, whole: PassStatistics
) -> float:
    """Return how many components matter to a row; infinite where a pass did not count them."""
    weight = whole.n_samples if form is Precision.CENTRED else whole.checked_weight
    return float(sums.survivors[lane]) / weight if weight > 0 else math.inf


def most_survivors(
    covariance_type: str,
    n_components: int,
    n_features: int,
    *,
    compiled: bool,
    float64_price: float = 0.0,
) -> tuple[float, float, float]:
    """Return at how many survivors per row the centred form costs what others do.

    What products in float32 do, and in float64, and what it does itself when it evaluates all
    pairs, which takes `compiled` loops. Below one where the other always costs less. On a GPU
    `float64_price` is not 0.
    """
    if float64_price:
        on_gpu = prices.most_survivors(covariance_type, n_components, n_features, float64_price)
        return *on_gpu, math.inf
    costs = _COMPILED if compiled else _BY_TORCH
    kind, d = TYPE_OF[covariance_type], n_features
    products, alone = kind.n_rows(n_features), TYPE_OF[kind.alone].n_rows(n_features)
    float32 = 2 * products * n_components + _FEATURE * products + _LOGIT * n_components + _ROW
    screen = alone * n_components + _FEATURE * alone + costs.component * n_components
    screen *= costs.screened if n_features >= _NARROW else 1.0
    pair = costs.survivor(kind, d)
    features = d * (_DENSE_FEATURE + _DENSE_PRODUCT * d if kind.has_products else _DENSE_APART)
    dense = _DENSE_ROW + n_components * (_DENSE_PAIR + features) if compiled else math.inf
    others = _JUDGED * float32, _FLOAT64 * float32, dense
    float32_, float64, all_pairs = ((other - screen) / pair for other in others)
    return float32_, float64, all_pairs


@dataclass(slots=True, eq=False, kw_only=True)
class PrecisionPolicy:
    """One lane's choice: the `form` of its next pass, and what the choice depends on.

    `mode` is what the user chose (`config.EMConfig.precision`), `tol` that of the fit. `least` is
    the fastest form that the measured error of float32 admits. `next_check` is the pass, counted
    from 0, that measures it next; None: none does. `survivors` are the components that matter to a
    row, as far as a pass has counted them; the centred form takes them and the components that it
    may not screen, as many as are `unscreened`. At `most_survivors` of them it costs what float32
    products do, float64 ones, and all pairs. Its loops may be `compiled`. `float64_price` is that
    of the GPU where the rows lie (`TotalMoments`), 0 on CPUs.
    """

    mode: str
    tol: float
    form: Precision
    least: Precision
    next_check: int | None = None
    n_passes: int = 0
    survivors: float = math.inf
    unscreened: float = math.inf
    most_survivors: list[float]
    compiled: bool = False
    float64_price: float = 0.0

    @classmethod
    def first(
        cls,
        config: EMConfig,
        condition: float,
        start: Parameters,
        *,
        compiled: bool,
        float64_price: float = 0.0,
    ) -> PrecisionPolicy:
        """Return the choice for a lane that starts from such a condition."""
        kind, k, d = start.covariance_type, start.n_components, start.n_features
        skips = config.precision == "auto" and _skips_float32(float64_price)
        doubles = config.precision == "float64" or skips
        least = Precision.FLOAT64 if doubles else Precision.FLOAT32
        shape = most_survivors(kind, k, d, compiled=compiled, float64_price=float64_price)
        policy = cls(
            mode=config.precision,
            tol=config.tol,
            form=least,
            least=least,
            next_check=0 if config.precision == "auto" else None,
            most_survivors=list(shape),
            compiled=compiled,
            float64_price=float64_price,
        )
        if config.precision != "float32":
            fastest = policy._by_speed[0]
            is_exact = fastest is Precision.CENTRED
            policy.form = fastest if is_exact else _fastest(least, condition)
            if config.returns == "scored" and policy.form is Precision.CENTRED and not is_exact:
                # Whether the lane deserves the slowest form, a pass shows.
                policy.form = policy.exact
        return policy

    @property
    def measures_float32(self) -> bool:
        """Whether the next pass holds float32 against float64, on a part of the rows."""
        if self.next_check is None or self.n_passes < self.next_check:
            return False
        return self.form is self.least

    @property
    def kept(self) -> float:
        """How far below the others a component may lie and still be counted, nats."""
        return KEPT_ON_GPU if self.float64_price else KEPT

    @property
    def exact(self) -> Precision:
        """The faster of the forms that judge what float32 has come to."""
        return next(form for form in self._by_speed if form is not Precision.FLOAT32)

    def has_lost(self, error: float, *, survivors: float, in_range: bool) -> bool:
        """Take note of a pass; return whether an exact form has to repeat it.

        `error` is the measured one, nats per row, and `survivors` are per row: passes that measure
        take note of them, and centred ones of the survivors. `in_range` says that a float32
        pass's sums are numbers.
        """
        if self.measures_float32 or self.form is Precision.CENTRED:
            self.survivors = survivors
        if self.measures_float32:
            self.next_check = self.n_passes + _CHECK_PASSES
            limit = max(self.tol, SMALLEST_TOL) / 4
            if self.least is Precision.FLOAT32:
                self.least = Precision.FLOAT32 if error <= limit else Precision.FLOAT64
            elif error <= limit / 2 and not _skips_float32(self.float64_price):
                self.least = Precision.FLOAT32
        self.n_passes += 1
        if self.mode != "auto" or self.form is not Precision.FLOAT32:
            return False
        if not in_range:
            self.leave_float32()
        return self.least is Precision.FLOAT64

    def needed(self, condition: float, failed: bool) -> Precision:
        """Return the form that keeps the digits of stepped covariances, this one or a better."""
        if self.mode == "float32":
            return self.form
        if failed:
            return FORMS[min(FORMS.index(self.form) + 1, len(FORMS) - 1)]
        better = _fastest(self.form, condition)
        # Where float64 products would repeat the pass, the centred form may take less time.
        leaves = better is Precision.FLOAT64 and self.form is Precision.FLOAT32
        return self.exact if leaves else better

    @property
    def asks_for_screen(self) -> bool:
        """Whether the centred form would be fast enough, if it may screen all components."""
        *products, all_pairs = self.most_survivors
        return self.survivors <= min(_STAY * max(products), all_pairs)

    @property
    def all_pairs(self) -> bool:
        """Whether the next pass takes all pairs of rows and components, about the means."""
        is_dense = self.compiled and self._pairs > self.most_survivors[2]
        return is_dense and self.form is Precision.CENTRED

    def come_back(self, condition: float) -> None:
        """Take a faster form, if a step of such a condition has shown that it may."""
        if self.mode == "float32":
            return
        for form in self._by_speed:
            if form is self.form:
                return
            if condition * _BACK <= MAX_CONDITION[form]:
                self.form = form
                if self.next_check is not None:
                    self.next_check = self.n_passes
                return

    def leave_float32(self) -> None:
        """Take float32 no more."""
        self.least, self.next_check = Precision.FLOAT64, None

    def ends_at(self, gain: float, bounds: Sequence[float]) -> bool:
        """Say whether this form has no more to do, after a gain (nats per row) to the last bound.

        Float32 leaves the last gain to float64: it ends where the next gain, by the last two, would
        be below tol. So a lane ends where float64 alone would, after two passes of it.
        """
        if self.form is not Precision.FLOAT32 or self.mode != "auto":
            return gain < self.tol
        if len(bounds) > 2 and math.isfinite(gain) and (last := abs(bounds[-2] - bounds[-3])) > 0:
            gain *= min(gain / last, 1.0)
        return not gain >= max(self.tol, SMALLEST_TOL)

    @property
    def _by_speed(self) -> list[Precision]:
        """The forms that the lane may take, the fastest first."""
        products = list(FORMS[FORMS.index(self.least) : 2])
        *most, all_pairs = self.most_survivors
        stay = _STAY if self.form is Precision.CENTRED else 1.0
        place = len(products)
        for i, form in reversed(list(enumerate(products))):
            at_most = most[FORMS.index(form)]
            if all_pairs <= at_most or self._pairs <= stay * at_most:
                place = i
        return [*products[:place], Precision.CENTRED, *products[place:]]

    @property
    def _pairs(self) -> float:
        """The pairs of a row that the centred form would take."""
        return self.survivors + self.unscreened


def _skips_float32(float64_price: float) -> bool:
    """Say whether float32 saves nothing: passes that measure it then count survivors alone."""
    return 0 < float64_price <= prices.SAME_PRICE


def _fastest(least: Precision, condition: float) -> Precision:
    """Return the fastest form, from `least` on, that bears a condition; NaN takes the best."""
    forms = FORMS[FORMS.index(least) :]
    return next((form for form in forms if condition <= MAX_CONDITION[form]), Precision.CENTRED)
