"""Imported by isolation's fork server, before any child is forked from it."""

from fpxbench.sweep.worker import preload

preload()
