"""The checker that executes annotations in tests: beartype, with whole numbers as floats.

A fit calls the same few functions thousands of times, and a check takes as long as the step
that it checks. So the first calls of each test are checked, and the rest are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

CALLS_OF_A_TEST = 1500

_conf = BeartypeConf(is_pep484_tower=True)
_left = CALLS_OF_A_TEST


def begin_test(checks: bool) -> None:
    """Check annotations anew, of as many calls as there are for each test, or of none."""
    global _left
    _left = CALLS_OF_A_TEST
    jaxtyping.config.update("jaxtyping_disable", not checks)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have `function` check its arguments, which jaxtyping asks of what stands for another one."""
    checking = beartype(conf=_conf)(function)

    @wraps(checking)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _left
        _left -= 1
        if _left == 0:
            jaxtyping.config.update("jaxtyping_disable", True)
        return checking(*args, **kwargs)

    return counted
