"""How sure a fit is: its parameters, its clusters and its K, by resampled rows."""
