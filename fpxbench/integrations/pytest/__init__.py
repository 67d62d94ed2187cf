"""The pytest plugin: `pytest --benchmark`."""
