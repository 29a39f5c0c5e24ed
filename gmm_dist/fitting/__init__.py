"""Fits and sweeps of lakes: plan, session, sweep, checkpoint and claim, assembled once."""
