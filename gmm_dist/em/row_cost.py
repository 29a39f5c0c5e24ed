"""What a row costs in each form of the E-step, so that a lane takes the one that takes least time.

The figures are multiplications and additions of a float32 matrix product, the unit in which
processors differ least: fitted to passes over shapes from d = 2 to 128 and k = 3 to 256
(`benchmarks/forms.py`). They choose between forms, never what these return.
"""

from __future__ import annotations

from gmm_dist.model.covariance import TYPE_OF

_FLOAT64 = 2.4  # a pass of float64 products, in passes of float32
_FEATURE, _LOGIT = 5.0, 25.0  # to make a feature; a logit's share of the softmax
_COMPONENT = 3e6 / (1 << 14)  # calls for a component, dealt to the rows of a piece
_PAIR, _PAIR_FEATURE, _PAIR_PRODUCT = 6e3, 400.0, 5.0  # one survivor: in all, per d, per d²


def most_survivors(covariance_type: str, n_components: int, n_features: int) -> tuple[float, float]:
    """Return at how many survivors per row the centred form costs what products do.

    In float32, and in float64; below one where products always cost less.
    """
    kind = TYPE_OF[covariance_type]
    products, alone = (_n_rows(name, n_features) for name in (covariance_type, kind.alone))
    float32 = 2 * products * n_components + _FEATURE * products + _LOGIT * n_components
    screen = alone * n_components + _FEATURE * alone + (_LOGIT + _COMPONENT) * n_components
    pair = _PAIR + _PAIR_FEATURE * n_features
    if kind.has_products:
        pair += _PAIR_PRODUCT * n_features * n_features
    return (float32 - screen) / pair, (_FLOAT64 * float32 - screen) / pair


def _n_rows(covariance_type: str, n_features: int) -> int:
    rows = TYPE_OF[covariance_type].rows(n_features)
    n: int = rows.stop - rows.start
    return n
