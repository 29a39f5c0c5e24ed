"""Verify a committed fit, by fitting it again: `gmm-dist verify`, from a clone or a Ray job."""

from gmm_dist.commands import early

if __name__ == "__main__":
    early.main("verify")
