"""Night after night: ids are kept, drift is measured, a gate decides, a registry keeps the models."""
