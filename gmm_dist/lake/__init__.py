"""A lake: tables and files, planned to the row, read into shards.

Nothing here knows mixtures or how they are fitted.
"""
