"""What a pass costs on a GPU, by its form: predicted from the shape, in nanoseconds a row.

All constants were measured on one H200 (torch 2.11, 2026-11-27, docs/gpu-measured.md), at
1M × 128 with K = 1,024 and 10M × 64 with K = 64; of another card only the price of float64 is
known. They choose between forms, no more.
"""

from __future__ import annotations

from dataclasses import dataclass

from gmm_dist.model.covariance import TYPE_OF

SAME_PRICE = 1.25
"""Where float64 takes at most so many times as long as float32, float32 is not worth its care."""

_PRODUCTS = 1 / 50e3  # a multiplication or addition in float64 or IEEE float32, both products
_HALF = 1 / 650e3  # the same in float16, the screen's product
_FEATURE, _HALF_FEATURE = 0.0043, 0.0029  # to make a feature
_LOGIT = 0.03  # its share of the softmax
_SELECTED = 0.024  # a logit's share of the screen: the largest, compared, the pairs found
_ROW = 1.0
# A pair that survives: sorted, its row gathered twice, and evaluated, normalised, added.
_PAIR, _PAIR_FEATURE, _PAIR_PRODUCT = 2.5, 0.023, 1.4e-4
TILE = 64
"""Rows of one component that are evaluated together; its last tile is half empty."""
_SHARING = 65_536  # rows whose pairs are put into tiles together


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a row costs in each form, nanoseconds; a screened pass has `pair` for each survivor."""

    float32: float
    float64: float
    screen: float
    pair: float

    def screened(self, survivors: float) -> float:
        """Return what a row with so many survivors costs in a screened pass."""
        return self.screen + self.pair * survivors


def prices(
    covariance_type: str, n_components: int, n_features: int, float64_price: float
) -> Prices:
    """Return what a row costs on a GPU where float64 takes so much longer than float32."""
    kind, k, d = TYPE_OF[covariance_type], n_components, n_features
    products, alone = kind.n_rows(d), TYPE_OF[kind.alone].n_rows(d)
    flops, rest = 4.0 * products * k, _FEATURE * products + _LOGIT * k + _ROW
    rate, feature = (_HALF, _HALF_FEATURE) if kind.has_products else (_PRODUCTS, _FEATURE)
    screen = 2.0 * alone * k * rate + feature * alone + _SELECTED * k + _ROW
    squares = d * d if kind.has_products else d
    pair = _PAIR + _PAIR_FEATURE * d + _PAIR_PRODUCT * squares * max(float64_price, 1.0)
    return Prices(
        float32=flops * _PRODUCTS + rest,
        # float64 is as fast as on an H200, or float32 is where float64 is a fraction of it.
        float64=flops * _PRODUCTS * float64_price + rest,
        screen=screen + pair * k * TILE / 2 / _SHARING,
        pair=pair,
    )


def most_survivors(
    covariance_type: str, n_components: int, n_features: int, float64_price: float
) -> tuple[float, float]:
    """Return at how many survivors a row a screened pass takes as long as products do.

    Products in float32, and in float64. Below one where the screen alone takes longer.
    """
    of = prices(covariance_type, n_components, n_features, float64_price)
    return (of.float32 - of.screen) / of.pair, (of.float64 - of.screen) / of.pair
