"""What a fitting job puts into report.html: a sample of the rows, the mixture as arrays."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gmm_dist.model.mixture import Mixture, labels
from gmm_dist.runs.load import Attempt
from gmm_dist.selection.coreset import DrawCoreset, keyed_generator
from gmm_dist.selection.ranking import SweepResult
from gmm_dist.shards.protocol import Shards
from gmm_dist.storage import redacted

logger = logging.getLogger("gmm_dist.report.of_fit")

NAME = "report.html"

# A coreset weighs no row more than twice the mean, so that half of it is a fair sample.
_DRAWN, _KEPT = 4096, 2000  # rows
_PICTURE = 3  # the stream of keyed random numbers


def draw(shards: Shards, result: SweepResult, random_state: int) -> torch.Tensor | None:
    """Return a fair sample (m, d) of the fitted rows, about their centre, for the picture.

    One pass over the rows. None, and a line in the log, where that fails: the fit is done, and
    nothing for the eye may cost it.
    """
    if result.best is None:
        return None
    try:
        coreset = shards.run(DrawCoreset.of(result.total, _DRAWN, random_state))
        return coreset.fair(_KEPT, keyed_generator(random_state, _PICTURE))
    except Exception as error:
        logger.warning("%s will have no picture of the rows: %s", NAME, _line(error))
        return None


def write(
    attempt: Attempt,
    content: Mapping[str, Any] | None,
    mixture: Mixture | None = None,
    sample: torch.Tensor | None = None,
    *,
    numbers: Sequence[int | None] | None = None,
    nightly: Mapping[str, Any] | None = None,
) -> bool:
    """Draw the report and write it as one file of the result; return whether it was.

    `content` is that of sweep.json, `sample` (m, d) in feature units; `numbers` name the
    components (default: the mixture's), None a newborn of a model that is not published;
    `nightly` is as `report.render` takes it. Without a mixture there are the candidates alone,
    without `content` the gate's verdict alone.

    A report that cannot be drawn is left out with a line in the log: hours of fitting must not
    end with nothing because of a picture.
    """
    try:
        html = _rendered(content, mixture, sample, numbers, nightly)
    except Exception as error:
        logger.warning("%s could not be drawn and is left out: %s", NAME, _line(error))
        return False
    attempt.write(NAME, html.encode())
    return True


def _rendered(
    content: Mapping[str, Any] | None,
    mixture: Mixture | None,
    sample: torch.Tensor | None,
    numbers: Sequence[int | None] | None,
    nightly: Mapping[str, Any] | None,
) -> str:
    # Half a second to import, and only now anybody needs it.
    from gmm_dist.report import page
    from gmm_dist.report.projection import Clusters

    if content is not None:
        content = {**content, "data": redacted(str(content["data"]))}
    if mixture is None:
        return page.render(content, nightly=nightly)
    parameters, known = mixture.parameters, numbers or mixture.component_ids
    clusters = Clusters(
        parameters.weights.numpy(),
        parameters.means.numpy(),
        parameters.covariances.numpy(),
        parameters.covariance_type,
        tuple(mixture.feature_names),
        tuple("new" if number is None else str(number) for number in known),
    )
    rows = None
    if sample is not None:
        rows = page.Sample(sample.numpy(), labels(parameters, sample).numpy())
    return page.render(content, clusters, rows, nightly)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
