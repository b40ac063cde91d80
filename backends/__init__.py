"""Backends: one folder each, found through :func:`qigen.backends.base.backend`."""
