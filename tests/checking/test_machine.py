"""A CPU's read bandwidth is measured by work that takes no longer than reading."""

import torch

from fpxbench.checking.machine import measure_read_bandwidth


def test_no_subnormal_is_multiplied(monkeypatch):
    first, mv = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda matrix, vector: first.append(float(matrix[0, 0])) or mv(matrix, vector))
    assert measure_read_bandwidth("cpu", 1 << 20) > 0
    assert first and min(first) >= torch.finfo(torch.float32).smallest_normal
