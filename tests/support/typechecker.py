"""The checker that executes annotations in tests: beartype, with whole numbers as floats."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
