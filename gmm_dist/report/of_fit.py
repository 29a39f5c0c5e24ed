"""Draw the report of a fit or a night, from its results, as one file beside them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gmm_dist.formats import one_line
from gmm_dist.model.mixture import Mixture, cluster_labels, labels
from gmm_dist.runs.load import Attempt
from gmm_dist.storage import redacted

logger = logging.getLogger("gmm_dist.report.of_fit")

NAME = "report.html"


def write(
    attempt: Attempt,
    content: Mapping[str, Any] | None,
    mixture: Mixture | None = None,
    sample: torch.Tensor | None = None,
    *,
    numbers: Sequence[int | None] | None = None,
    nightly: Mapping[str, Any] | None = None,
    title: str | None = None,
    command: str | None = None,
) -> bool:
    """Draw the report and write it as one file of the result; return whether it was.

    A report that cannot be drawn is left out with a line in the log: hours of fitting must not
    end with nothing because of a picture.

    Args:
        attempt: Where the file goes.
        content: That of sweep.json; None for the gate's verdict alone.
        mixture: The best mixture; None for the candidates alone.
        sample: Rows (m, d) in feature units, for the picture.
        numbers: Names of the components (default: the mixture's); None for a newborn of a model
            that is not published.
        nightly, title, command: As `page.render` takes them.
    """
    try:
        html = _rendered(content, mixture, sample, numbers, nightly, (title, command))
    except Exception as error:
        logger.warning("%s could not be drawn and is left out: %s", NAME, one_line(error))
        return False
    attempt.write(NAME, html.encode())
    return True


def _rendered(
    content: Mapping[str, Any] | None,
    mixture: Mixture | None,
    sample: torch.Tensor | None,
    numbers: Sequence[int | None] | None,
    nightly: Mapping[str, Any] | None,
    about: tuple[str | None, str | None],
) -> str:
    # Takes half a second to import, and is needed here alone.
    from gmm_dist.report import page
    from gmm_dist.report.description import arrays_of
    from gmm_dist.report.of_components import Intervals

    title, command = about
    if content is not None:
        content = {**content, "data": redacted(str(content["data"]))}
    if mixture is None:
        return page.render(content, nightly=nightly, title=title, command=command)
    parameters, ids = mixture.parameters, numbers or mixture.component_ids
    merged = mixture.clusters
    names = tuple("new" if number is None else str(number) for number in ids)
    clusters = arrays_of(mixture, names)
    rows = None
    if sample is not None:
        own = None
        if merged is not None:
            own = cluster_labels(parameters, sample, merged.of_component).numpy()
        rows = page.Sample(sample.numpy(), labels(parameters, sample).numpy(), own)
    return page.render(
        content,
        clusters,
        rows,
        nightly,
        merged,
        Intervals.of(mixture),
        title=title,
        command=command,
    )
