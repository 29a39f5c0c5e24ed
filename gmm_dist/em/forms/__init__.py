"""The forms of the E-step: how a chunk of rows becomes sufficient statistics."""
