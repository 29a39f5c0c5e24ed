"""Score a batch of rows: the kept columns, and what the mixture says of each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from gmm_dist.errors import UserError
from gmm_dist.model.clusters import merged
from gmm_dist.model.densities import Densities
from gmm_dist.model.parameters import Parameters

COMPONENT, PROBABILITY, LOG_DENSITY = "component", "probability", "log_density"
CLUSTER = "cluster"
PROBABILITIES, OUTLIER = "probabilities", "outlier"
DATA_FILE, ROW_INDEX = "data_file", "row_index"

_LEAST = -1e300  # of a log-density, nats: no -inf, from which nothing can be subtracted


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scoring:
    """Say which mixture scores the rows, and what is written beside the columns `kept`.

    `is_placed` has each row's place in the lake written too: its data file and its number there.
    `probabilities` asks for all responsibilities; `threshold` is the log-density (nats) below
    which a row is an outlier, None to mark none. `ids` are the numbers that `component` gives in
    place of the components' places in the mixture; `probabilities` keep the mixture's order.
    `clusters` is each component's cluster, None where the model has none: of a row, `cluster` is
    the one of largest probability, which is the sum of its components'; `cluster_ids` are the
    numbers that it gives in place of the clusters' own. `compiled`, on a CPU compiled loops
    evaluate the rows where Numba is there.

    Raises UserError when a kept column has the name of one that is written.
    """

    mixture: Parameters
    kept: pa.Schema
    probabilities: bool = False
    threshold: float | None = None
    ids: tuple[int, ...] | None = None
    clusters: tuple[int, ...] | None = None
    cluster_ids: tuple[int, ...] | None = None
    is_placed: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        taken = [name for name in self.kept.names if name in self._added().names]
        if taken:
            raise UserError(
                f"{taken[0]} would stand beside the column of that name that is written",
                option="keep",
                remedy="leave it out, or rename it in the lake",
            )

    @property
    def schema(self) -> pa.Schema:
        """The columns of a scored file: those that go along, then the scores."""
        return pa.schema([*self.along, *self._scores()])

    @property
    def along(self) -> pa.Schema:
        """The columns that go along with the scores: those kept, then a row's place in the lake."""
        return pa.schema([*map(_plain, self.kept), *self._place()])

    def _added(self) -> pa.Schema:
        return pa.schema([*self._place(), *self._scores()])

    def _place(self) -> pa.Schema:
        fields = [(DATA_FILE, pa.string()), (ROW_INDEX, pa.int64())]
        return pa.schema(fields if self.is_placed else [])

    def _scores(self) -> pa.Schema:
        fields = [
            (COMPONENT, pa.int32()),
            (PROBABILITY, pa.float64()),
            (LOG_DENSITY, pa.float64()),
        ]
        if self.clusters is not None:
            fields.insert(1, (CLUSTER, pa.int32()))
        if self.probabilities:
            fields.append((PROBABILITIES, pa.list_(pa.float64(), self.mixture.n_components)))
        if self.threshold is not None:
            fields.append((OUTLIER, pa.bool_()))
        return pa.schema(fields)


def _plain(field: pa.Field) -> pa.Field:
    """Return a field without metadata, its values spelt out where it was a dictionary."""
    type_ = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, type_)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scores:
    """The scores of n rows: float64 and nats; NaN, and component 0, for rows with missing values.

    `components` (n,) int32 of largest responsibility, `probabilities` (n,) that responsibility,
    `log_densities` (n,), `clusters` (n,) int32 of largest responsibility where the model has them,
    and `resp` (n, k) all responsibilities if asked for.
    """

    components: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float64]
    log_densities: npt.NDArray[np.float64]
    clusters: npt.NDArray[np.int32] | None = None
    resp: npt.NDArray[np.float64] | None = None


def device() -> torch.device:
    """Return where this process scores: on a GPU if it may see one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Scorer:
    """Scores batches of rows; holds the factors of the mixture between them.

    Float64, each component centred on its own mean; on a GPU where there is one.
    """

    def __init__(self, scoring: Scoring) -> None:
        self._scoring, self._schema = scoring, scoring.schema
        ids = scoring.ids or range(scoring.mixture.n_components)
        self._numbers = np.array(ids, dtype=np.int32)
        named = scoring.cluster_ids or range(scoring.mixture.n_components)
        self._clusters = np.array(named, dtype=np.int32)
        self._densities = Densities.of(scoring.mixture, device(), compiled=scoring.compiled)

    def table(self, along: pa.Table, X: npt.NDArray[np.float64]) -> pa.Table:
        """Return the scored table of rows `X` (d, n); null where a feature is missing (NaN).

        `along` has the columns that go along, as `Scoring.along` orders them.
        """
        missing = np.isnan(X).any(axis=0)
        scores = self.scores(X)
        columns = [
            # Times may lose digits that the output cannot hold; nothing else may change.
            column.cast(field.type, safe=not pa.types.is_timestamp(field.type))
            for column, field in zip(along.columns, self._schema, strict=False)
        ]
        columns.append(pa.array(self._numbers[scores.components], mask=missing))
        if scores.clusters is not None:
            columns.append(pa.array(self._clusters[scores.clusters], mask=missing))
        columns += [
            pa.array(scores.probabilities, mask=missing),
            pa.array(scores.log_densities, mask=missing),
        ]
        if scores.resp is not None:
            values, k = pa.array(scores.resp.ravel()), scores.resp.shape[1]
            columns.append(pa.FixedSizeListArray.from_arrays(values, k, mask=pa.array(missing)))
        if (threshold := self._scoring.threshold) is not None:
            columns.append(pa.array(scores.log_densities < threshold, mask=missing))
        return pa.table(columns, schema=self._schema)

    def scores(self, X: npt.NDArray[np.float64]) -> Scores:
        """Return the scores of rows `X` (d, n)."""
        parts = [self._of(logits) for logits in self._densities.chunks(X.T)]
        return Scores(
            **{name: torch.cat([p[name] for p in parts]).cpu().numpy() for name in parts[0]}
        )

    def _of(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the scores of a chunk, by their names in `Scores`."""
        top, component = logits.max(0)
        if bool(top.isinf().any()):  # so far out that every distance overflows
            logits = logits.clamp_min(_LEAST)
            top, component = logits.max(0)
        shares = (logits - top).exp_()
        total = shares.sum(0)
        scores = {
            "components": component.int(),
            "probabilities": total.reciprocal(),
            "log_densities": top + total.log(),
        }
        if (clusters := self._scoring.clusters) is not None:
            scores["clusters"] = merged(shares, clusters).argmax(0).int()
        if self._scoring.probabilities:
            scores["resp"] = (shares / total).T
        return scores
