"""Fit every K that is asked for, keep the best: `gmm-dist sweep`, from a clone or a Ray job."""

from gmm_dist.commands import early

if __name__ == "__main__":
    early.main("sweep")
