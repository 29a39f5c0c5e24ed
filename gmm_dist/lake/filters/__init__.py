"""Which rows of a lake pass: a filter as text, as a value, as an expression of pyarrow."""
