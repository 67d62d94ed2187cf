"""Fixtures that several files share."""

import gc
import os
import shutil
import signal
import tempfile
from functools import partial

import pytest

# Tests run in parallel (`make test`): each process gets one core, and so do the children of its tests. Set before
# PyTorch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from fpxbench.checking.device_lock import FOLDER_VARIABLE


@pytest.fixture(scope="module")
def one_thread():
    """Keep PyTorch in this process on one thread: on a machine that does something else as well, the barriers at the
    end of thousands of small parallel loops cost ten times what the loops save."""
    import torch  # here, as the process that only hands out tests loads this file too

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_repeats(monkeypatch):
    """Have a check of repeated calls make 20 of them: else it fills its share of the check's budget, a second of 5."""
    from fpxbench.checking import serving_calls

    monkeypatch.setattr(serving_calls, "check_repeats", partial(serving_calls.check_repeats, most=20))


@pytest.fixture(scope="module")
def few_targets(tmp_path_factory):
    """Have reports show a few rows of the package's matrix of targets."""
    from few_targets import write_few_targets

    from fpxbench.reports.targets import support_table

    file = write_few_targets(tmp_path_factory.mktemp("targets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support_table, "SHIPPED", file)
        yield


def pytest_configure(config):
    # A runner that was started in the background ignores SIGINT, and so would every process that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests wait neither for a sweep outside that holds a device lock, nor for those of another process of theirs.
    os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="fpxbench-test-locks-")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ.pop(FOLDER_VARIABLE))


LONGEST = [
    "sweep/test_faulty_impls", "fleet/test_fleet_cluster", "impls/test_impls", "integrations/test_pytest_plugin",
    "diagnosis/test_diagnose", "sweep/test_parallel", "cases/test_cases", "integrations/test_asv",
    "diagnosis/test_confusion", "sweep/test_sweep", "impls/test_triton_aot", "impls/test_triton_fused",
    "numbers/test_fake_quantize", "targets/test_targets", "impls/test_cpu_fused", "impls/test_fragments",
    "diagnosis/test_activation_faults", "checking/test_activation_rules", "targets/test_targets_inductor",
    "model/test_float_tensor", "builds/test_environments", "diagnosis/test_inspect", "model/test_generate",
    "checking/test_accumulator", "diagnosis/test_no_false_alarm", "model/test_encoder_ranking", "sweep/test_repro",
    "numbers/test_packing", "test_bad_input", "numbers/test_tensor_codec", "casts/test_cast_run",
    "diagnosis/test_scale_functions", "diagnosis/test_random_maps", "casts/test_conformance", "test_cli",
    "fleet/test_fleet_parts", "model/test_merged_projections", "checking/test_expert_calls", "model/test_quality",
    "reports/test_report",
]
"""Files of about ten processor seconds and more, longest first. Begun last, one would keep one core busy while the
others wait. Those that mostly wait themselves (for a cluster, a time limit, other processes) stand apart."""


def pytest_collection_modifyitems(items):
    ranks = {f"tests/{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


def pytest_collection_finish(session):
    # Every garbage collection, of which each trial makes one, would visit the million objects of PyTorch and of the
    # tests.
    gc.freeze()
