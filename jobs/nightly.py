"""Fit tonight's rows, publish the model if it passes: `gmm-dist nightly`, from a clone."""

from gmm_dist.commands import early

if __name__ == "__main__":
    early.main("nightly")
