"""Claims about cpu_fused: right by the vectors of every CPU, and refused where it cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpxbench.implementation import discover
from fpxbench.impls import _cpu_build
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight

CHILD = Path(__file__).parents[1] / "helpers" / "cpu_kernels_child.py"
# One for each way to decode and to find the scale; each is compiled, which takes two to four seconds with vectors. A
# CPU's own are tried with all, the narrower ones with some.
SCHEMES = ("e4m3fn-row", "e5m2fnuz-row", "e3m4-row", "int8-row", "e2m3-row", "e2m1-g8", "mxfp4", "nvfp4.div", "nf4-g64",
           "mxfp8_e4m3fn", "e3m2-g128")
SOME = ("e5m2fnuz-row", "int8-row", "e2m3-row", "mxfp4", "nvfp4.div", "nf4-g64", "mxfp8_e4m3fn", "e3m2-g128")
CAPABILITIES = {"AVX512": ("avx512", SCHEMES), "AVX2": ("avx2", SOME), "DEFAULT": ("default", SCHEMES[4:8])}
CPU_FUSED = discover()[0]["cpu_fused"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["core", "whole"])
def test_products_and_codes_are_right_by_the_vectors_of_every_cpu(capability, whole):
    widest = torch.backends.cpu.get_cpu_capability()
    names = list(CAPABILITIES)
    if names.index(capability) < names.index(widest if widest in names else "DEFAULT"):
        pytest.skip(f"this CPU has no {capability}: PyTorch takes ATEN_CPU_CAPABILITY unchecked, and instructions fail")
    variable, some = CAPABILITIES[capability]
    schemes = SCHEMES if whole or capability == widest else some
    environment = {"ATEN_CPU_CAPABILITY": variable}
    if whole:       # bf16 pairs on a CPU on which they are slow, too
        environment["CXX"] = f"{_cpu_build.compiler()} -DPAIRS_ON_EVERY_CPU"
    child = subprocess.run([sys.executable, str(CHILD), *schemes], capture_output=True, text=True,
                           env=os.environ | environment)
    assert child.returncode == 0, child.stderr
    found, *problems = child.stdout.splitlines()
    assert found == capability and not problems


@pytest.mark.parametrize("size", [1e-36, 1e-3, 1e4, 1e36])
@pytest.mark.parametrize("scheme, one", [("e4m3fn-row", 0x38), ("e3m2-row", 0x0C)])
def test_activations_of_any_size_keep_their_precision(scheme, one, size):
    codes = torch.full((1, 256), one, dtype=torch.uint8)
    weight = QuantizedWeight.from_codes(codes, Scales(torch.full((1, 1), 0.5)), scheme_named(scheme))
    x = torch.full((1, 256), size, dtype=torch.bfloat16)
    torch.testing.assert_close(CPU_FUSED().matmul(x, weight), 128 * x[:, :1], rtol=0, atol=0)


def test_a_scale_that_overflows_with_the_decode_factor_is_applied_all_the_same():
    scheme = scheme_named("e4m3fn-row")
    codes = torch.full((4, 64), 1, dtype=torch.uint8)       # 2**-9
    weight = QuantizedWeight.from_codes(codes, Scales(torch.full((4, 1), 2.0**125)), scheme)
    x = torch.zeros(9, 64, dtype=torch.bfloat16)
    x[:, 3] = 1
    for m in (1, 2, 9):
        assert bool((CPU_FUSED().matmul(x[:m], weight) == 2.0**116).all())


def test_without_a_compiler_it_is_missing_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys.modules[CPU_FUSED.__module__], "compiler", lambda: None)
    support = CPU_FUSED().supports(scheme_named("mxfp4"), "cpu")
    assert not support.supported and support.missing and "install g++" in support.reason


def test_a_compiler_that_fails_is_an_error_with_its_message(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_cpu_build, "compiler", lambda: "c++ --no-such-flag")
    scheme = scheme_named("mxfp4")
    with pytest.raises(RuntimeError, match="no-such-flag"):
        _cpu_build.library.__wrapped__(scheme.format, scheme.scaling)


def test_a_library_is_compiled_once_and_found_again_by_another_process(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")    # compiled in the shortest time
    scheme = scheme_named("e2m1-row")
    _cpu_build.library.__wrapped__(scheme.format, scheme.scaling)
    (built,) = (tmp_path / "fpxbench" / "cpu").glob("*.so")
    before = built.stat().st_mtime_ns
    _cpu_build.library.__wrapped__(scheme.format, scheme.scaling)
    assert built.stat().st_mtime_ns == before and list(built.parent.iterdir()) == [built]
