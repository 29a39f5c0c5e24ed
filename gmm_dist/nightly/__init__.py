"""Nights of a lake: ids are kept, drift is measured, a gate decides, a registry keeps."""
