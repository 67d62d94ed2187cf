"""Imported by the fork server of `fpxbench.sweep.isolation` before it forks its first child."""

from fpxbench.sweep.preload import preload

preload()
