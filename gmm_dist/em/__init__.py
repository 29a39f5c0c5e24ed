"""Expectation-maximisation: the E-step over shards, the M-step, and the loop that alternates them.

Nothing here knows Ray, files or lakes: rows come as `gmm_dist.shards` serves them.
"""
