"""Fit one Gaussian mixture to a lake: `gmm-dist fit`, from a clone or a Ray job."""

from gmm_dist.commands import early

if __name__ == "__main__":
    early.main("fit")
