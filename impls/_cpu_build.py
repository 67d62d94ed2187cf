"""Compile `_cpu_kernels.cpp` for a scheme and for this CPU's vectors, and call it.

A C++ compiler takes one to two seconds. The library is kept in ``$XDG_CACHE_HOME/fpxbench/cpu``, named after a hash of
source and command.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fpxbench.cache_folder import cache_root
from fpxbench.numbers.codebook import Codebook, NumberFormat
from fpxbench.numbers.formats import SPECIALS
from fpxbench.numbers.packing import padded_k, pieces
from fpxbench.numbers.scaling import Scales, Scaling
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight

SOURCE = Path(__file__).with_name("_cpu_kernels.cpp")
COMMON_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC", "-fopenmp")
VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""Compiler flags by the CPU capability that PyTorch reports (``ATEN_CPU_CAPABILITY=avx2`` lowers it); other CPUs decode
one code at a time."""
WIDEST_EXPONENT = 5
"""Exponent bits of fp16, through which codes are decoded."""
KINDS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights are decoded to; the index is the number in the source."""
WEIGHTS_OF_A_THREAD = 1 << 15
"""Weights per thread, at least: starting a thread for fewer costs more than it saves."""


@cache
def compiler() -> str | None:
    """Return the C++ compiler: ``$CXX``, or the first of g++, clang++ and c++ on the path; None if there is none."""
    named = os.environ.get("CXX")
    return named or next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def constants(fmt: NumberFormat, scaling: Scaling) -> dict[str, int]:
    """Return the macros that `_cpu_kernels.cpp` explains."""
    block = 0 if scaling.block is None else scaling.block
    of_codes = {"BITS": fmt.bits, "EXPONENT": 0, "MANTISSA": 0, "BIAS": 0, "SPECIALS": 0, "INTEGER": 0}
    numbers = decode_table(fmt)
    of_codes["BF16_EXACT"] = int(torch.equal(numbers.bfloat16().float(), numbers))      # not where NaN is
    if not isinstance(fmt, Codebook) and (fmt.twos_complement or fmt.exponent_bits <= WIDEST_EXPONENT):
        of_codes |= {
            "EXPONENT": fmt.exponent_bits, "MANTISSA": fmt.mantissa_bits, "BIAS": fmt.bias,
            "SPECIALS": SPECIALS.index(fmt.specials), "INTEGER": int(fmt.twos_complement),
        }
    return of_codes | {"BLOCK": block, "CODED": int(scaling.scale_format.coded)}


@cache
def library(fmt: NumberFormat, scaling: Scaling) -> ctypes.CDLL:
    """Return the compiled kernels of a format and a scaling. Raise RuntimeError with the compiler's message."""
    vectors = torch.backends.cpu.get_cpu_capability()
    flags = [*COMMON_FLAGS, *VECTOR_FLAGS.get(vectors, ())]
    if vectors == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        flags.append("-mavx512bf16")
    flags += [f"-D{name}={value}" for name, value in constants(fmt, scaling).items()]
    command = [*shlex.split(compiler() or "c++"), *flags]
    digest = hashlib.sha256(SOURCE.read_bytes() + "\0".join(command).encode()).hexdigest()[:16]
    folder = cache_root() / "cpu"
    file = folder / f"{digest}.so"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            built = Path(unfinished) / "kernels.so"
            done = subprocess.run([*command, str(SOURCE), "-o", str(built)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
            built.replace(file)      # atomic, as another process may build the same
    loaded = ctypes.CDLL(str(file))
    if hasattr(loaded, "product_bf16"):
        loaded.product_bf16.restype = ctypes.c_bool
    return loaded


class _Weight(ctypes.Structure):
    """`Weight` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "table", "scales", "scale_table")),
        *((name, ctypes.c_int64) for name in ("k", "plane", "row_bytes", "blocks", "scale_rows")),
    ]


class Kernels:
    """The kernels of one weight: operands in the form that the library reads, kept alive."""

    def __init__(self, weight: QuantizedWeight) -> None:
        (self.n, k), scheme = weight.shape, weight.scheme
        fmt, scaling = scheme.format, scheme.scaling
        if fmt is None or scaling is None:
            raise ValueError(f"a {scheme.name} weight is not quantized: there is nothing to decode")
        self.k = padded_k(k)
        packed, scales, factors, table = weight.packed.contiguous(), *_scales(weight, scaling), _table(fmt)
        if scaling.block is not None and (past := -(-self.k // scaling.block) - scales.shape[1]):
            scales = torch.nn.functional.pad(scales, (0, past))     # blocks past K, whose codes are zero
        self._kept = packed, scales, factors, table
        rows = self.n if scaling.block_rows is None or len(scales) == 1 else scaling.block_rows
        planes = 8 // pieces(fmt.bits)[-1][1]
        self._weight = _Weight(
            packed.data_ptr(), table.data_ptr(), scales.data_ptr(), factors.data_ptr(),
            self.k, self.k // planes, packed.shape[1], scales.shape[1], rows,
        )
        self._library = library(fmt, scaling)

    def product(self, x: Tensor) -> Tensor:
        """Return x fp32 [M, k] times the weight: fp32 [M, N]."""
        out = x.new_empty(len(x), self.n)
        self._library.product(
            ctypes.byref(self._weight), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)),
            ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(self.n), self._threads(self.n),
        )
        return out

    def product_bf16(self, x: Tensor) -> Tensor | None:
        """Return x bf16 [M, k] times the weight, fp32 [M, N], by products of bf16 pairs, or of floats where the CPU is
        faster at these; None on a CPU without pairs."""
        if not hasattr(self._library, "product_bf16"):
            return None
        padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 4)).contiguous()
        out = torch.empty(len(x), self.n)
        done = self._library.product_bf16(
            ctypes.byref(self._weight), ctypes.c_void_p(padded.data_ptr()), ctypes.c_int64(len(x)),
            ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(self.n), self._threads(self.n),
        )
        return out if done else None

    def decode(self, begin: int, out: Tensor) -> None:
        """Write the weight's rows from `begin` on to `out` [rows, k], fp32, bf16 or fp16, scaled."""
        self._library.decode(
            ctypes.byref(self._weight), ctypes.c_int64(begin), ctypes.c_int64(begin + len(out)),
            ctypes.c_void_p(out.data_ptr()), KINDS.index(out.dtype), self._threads(len(out)),
        )

    def _threads(self, rows: int) -> int:
        return max(1, min(torch.get_num_threads(), rows * self.k // WEIGHTS_OF_A_THREAD))


@cache
def _table(fmt: NumberFormat) -> Tensor:
    """Return the number of each code, fp32 [256], zeros past the last."""
    numbers = decode_table(fmt)
    return torch.nn.functional.pad(numbers, (0, 256 - len(numbers)))


@lru_cache(maxsize=1024)
def _factors(scaling: Scaling, tensor_scale: float | None) -> Tensor:
    """Return what each code of a coded scale stands for, fp32 [256]. Computing it takes 25 us."""
    codes = torch.arange(256, dtype=torch.uint8)
    if tensor_scale is None:
        return scaling.scale_format.decode(codes)
    return scaling.factors(Scales(codes[None], torch.tensor([tensor_scale]))).reshape(-1)


def _scales(weight: QuantizedWeight, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Return the scales [R, G] as the kernels read them, and what each code of a coded scale stands for, fp32 [256]."""
    if weight.scales is None or not scaling.scale_format.coded:
        return weight.scale_grid().contiguous(), torch.zeros(1)
    tensor_scale = None if weight.tensor_scale is None else weight.tensor_scale.item()
    return weight.scales.contiguous(), _factors(scaling, tensor_scale)
