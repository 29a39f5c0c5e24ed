"""`python -m gmm_dist`: the command `gmm-dist`."""

from gmm_dist.commands import early

if __name__ == "__main__":
    early.main()
