"""Score every row of a lake under a fitted mixture: `gmm-dist score`, from a clone or a Ray job."""

from gmm_dist.commands import early

if __name__ == "__main__":
    early.main("score")
