"""Every row of a lake scored under a model, into files beside the lake's own."""
