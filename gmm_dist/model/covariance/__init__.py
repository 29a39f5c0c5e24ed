"""The covariance types as exponential families.

For each type the weighted log-density of a row is linear in fixed features of the row,
`log w_k + log N(x | k) = Θ_k · φ(x)`, and the M-step needs nothing but `Σ_n r_nk φ(x_n)`.
One matrix of features serves all types, because its rows are ordered so that each type's
features are contiguous:

    row            0     1   2 .. d+1   d+2 .. 2d+1   then
    feature      ‖x‖²    1      x_i         x_i²      x_i x_j (i < j, see product_pairs)
    spherical    |-----------------|
    tied, tied-*         |---------|
    diag                 |-----------------------|
    full                 |---------------------------------------|

A quadratic that all components share cancels in the responsibilities, so it is left out of φ;
its scatter Σ w x xᵀ is a constant of the data.

`precisions_cholesky` is scikit-learn's: upper triangular U with U Uᵀ = Σ⁻¹ (full, tied),
1/σ (the others).

A further type is one class and its place in `TYPE_OF`.
"""

from gmm_dist.model.covariance.covariance_type import CovarianceType, Moments
from gmm_dist.model.covariance.matrices import Full, Tied
from gmm_dist.model.covariance.variances import Diag, Spherical, TiedDiag, TiedSpherical

__all__ = ["COVARIANCE_TYPES", "TYPE_OF", "CovarianceType", "Moments"]

TYPE_OF: dict[str, CovarianceType] = {
    covariance_type.name: covariance_type
    for covariance_type in (Full(), Tied(), Diag(), Spherical(), TiedDiag(), TiedSpherical())
}
"""The covariance types by their names."""
COVARIANCE_TYPES = tuple(TYPE_OF)
