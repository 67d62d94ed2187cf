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
    "sweep/test_faulty_impls", "impls/test_triton_aot", "integrations/test_asv", "impls/test_impls",
    "fleet/test_fleet_cluster", "cases/test_cases", "integrations/test_pytest_plugin", "diagnosis/test_diagnose",
    "diagnosis/test_confusion", "diagnosis/test_inspect", "targets/test_targets_inductor",
    "numbers/test_fake_quantize", "targets/test_targets", "test_docs", "builds/test_environments",
    "impls/test_triton_fused", "impls/test_fragments", "model/test_float_tensor", "sweep/test_parallel",
    "model/test_generate", "sweep/test_repro", "sweep/test_sweep", "diagnosis/test_no_false_alarm",
    "checking/test_activation_rules", "builds/test_sync", "numbers/test_tensor_codec", "sweep/test_plan",
    "numbers/test_packing", "checking/test_accumulator", "casts/test_cast_run",
]
"""Files of about ten processor seconds and more, longest first. Begun last, one would keep one core busy while the
others wait."""


def pytest_collection_modifyitems(items):
    ranks = {f"tests/{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


def pytest_collection_finish(session):
    # Every garbage collection, of which each trial makes one, would visit the million objects of PyTorch and of the
    # tests.
    gc.freeze()
