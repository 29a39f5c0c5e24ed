"""Too much for memory is said before anything is allocated."""

from __future__ import annotations

import pytest

from gmm_dist.errors import UserError
from gmm_dist.limits import lane_bytes, require_memory


def test_bytes_grow_with_components_and_features() -> None:
    # Σ K·P of float64, several copies, P = 1 + d + d(d + 1)/2.
    full = 1 + 128 + 128 * 129 // 2
    assert lane_bytes([(1024, "full")], 128) > 8 * 1024 * full
    assert lane_bytes([(1024, "full")], 128) < 20 * 8 * 1024 * full
    assert lane_bytes([(8, "diag")], 128) < lane_bytes([(8, "full")], 128) / 20


def test_what_fits_passes() -> None:
    require_memory([(k, "full") for k in range(2, 21)], 64, 2**30)


# 54 · 12,507,501 statistics in 8 copies, and 256 rows of as many features, of 8 bytes each.
def test_what_does_not_fit_is_one_line_with_the_numbers_and_a_remedy() -> None:
    wanted = (
        r"^the statistics of 54 components with 5,000 features need 64\.1 GiB in every worker, "
        r"which has 2\.0 GiB: use --covariance-type diag, smaller --k, fewer --columns, or fewer "
        r"workers per machine$"
    )
    with pytest.raises(UserError, match=wanted):
        require_memory([(k, "full") for k in range(2, 11)], 5000, 2 * 2**30)
    with pytest.raises(UserError, match="use smaller --k"):
        require_memory([(10**6, "spherical")], 5000, 2 * 2**30)
