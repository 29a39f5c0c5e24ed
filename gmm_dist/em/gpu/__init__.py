"""Passes on a GPU: what differs from the CPU's, since calls, copies and waits cost other times."""
