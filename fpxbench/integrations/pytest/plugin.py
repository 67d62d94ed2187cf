"""``pytest --benchmark``: the cases of a sweep as tests, timed into pytest-benchmark's table (docs/pytest.md).

pytest loads this module in every run of an environment that has fpxbench in it, so it imports nothing but pytest: what
does the work is loaded when the flag is given.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = "fpxbench"
"""What the ids of the benchmarks begin with, in whatever folder pytest is started."""
CASES = Path(__file__).with_name("cases.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fpxbench", "low-bit matmul benchmarks (fpxbench)")
    group.addoption(
        "--benchmark", action="store_true", dest="fpx_benchmark",
        help="run the low-bit matmul benchmarks, and only them; -k picks implementations, schemes, workloads by name",
    )
    group.addoption(
        "--impls", action="append", default=[], metavar="PATH", dest="fpx_impls",
        help="a file or folder of further implementations (may be repeated)",
    )
    group.addoption(
        "--fpx-profile", default="smoke", choices=("smoke", "quick", "full"),
        help="how many cases: smoke (default) takes a minute or two, quick several, full hours",
    )
    group.addoption("--fpx-device", choices=("cpu", "cuda"),
                    help="default: a GPU (NVIDIA or AMD: cuda) if PyTorch sees one, else cpu")
    group.addoption(
        "--fpx-scheme", action="append", default=[], metavar="GLOB", help="these schemes instead of the profile's"
    )
    group.addoption(
        "--fpx-workload", action="append", default=[], metavar="GLOB",
        help="these workloads instead of the profile's: llama2-7b.o, or llama2-7b.o/m16 for one number of tokens",
    )
    group.addoption(
        "--weights", metavar="FILE[:NAME]", dest="fpx_weights",
        help="quantize and measure these weights, [N, K] each, instead of random ones of the profile's workloads",
    )
    group.addoption(
        "--activations", metavar="FILE[:NAME]", dest="fpx_activations",
        help="multiply rows of this tensor [..., K]; cases of another K are refused",
    )
    group.addoption(
        "--fpx-seed", type=int, metavar="N", help="of the random weights and activations; default: a new one each run"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("fpx_benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs the plugin pytest-benchmark, which is not loaded (-p no:benchmark?)")
    from fpxbench.integrations.pytest.cases import Benchmarks

    config.pluginmanager.register(Benchmarks(config), "fpxbench-benchmarks")
    config.args, config.args_source = _arguments(config), pytest.Config.ArgsSource.ARGS


def _arguments(config: pytest.Config) -> list[str]:
    """Return what pytest collects: the benchmarks instead of ``testpaths`` or the current folder, and in addition to
    named paths.

    An id (``fpxbench::e4m3fn-row/llama2-7b.o/m1/bf16::triton_fused``) picks one.
    """
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        return [str(CASES)]
    ids = [arg for arg in config.args if arg.startswith(f"{ROOT}::")]
    others = [arg for arg in config.args if arg not in ids and arg != str(CASES)]
    return [str(CASES) + arg.removeprefix(ROOT) for arg in ids] + others if ids else [str(CASES), *others]
