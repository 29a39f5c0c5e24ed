"""Mixtures: parameters, covariance types, densities, criteria; a fitted mixture in use.

Nothing here knows where rows lie, how they are fitted, or what files look like.
"""
