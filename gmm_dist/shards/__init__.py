"""Rows in shards, and `run(task)` over them: in this process, or on Ray.

`protocol` says what tasks, summaries and shards are, `tree_sum` adds summaries in a fixed order,
`local` holds shards in this process, `ray_shards` in the actors of a Ray cluster.
"""
