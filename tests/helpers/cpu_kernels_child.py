"""Compare cpu_fused with the oracle under the CPU capability of this process's environment; print what is wrong."""

import sys

import torch

from fpxbench.checking import reference
from fpxbench.implementation import discover
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight

SHAPES = ((37, 75), (5, 1056), (9, 1), (6, 1000))     # ragged; a tail after vectors; less than one; whole blocks
K = 512
BF16 = torch.bfloat16


def products(implementation, scheme):
    for n, k in SHAPES:
        weight = implementation.quantize(torch.randn(n, k), scheme)
        for m, dtype in ((1, BF16), (11, BF16), (17, BF16), (7, torch.float16), (9, torch.float16)):
            x = torch.randn(m, k).to(dtype)
            expected = reference.matmul_reference(x, implementation.dequantize(weight), quantized=True)
            comparison = reference.compare(implementation.matmul(x, weight), expected)
            if not comparison.within:
                yield f"{scheme.name} {n} x {k}, M = {m}, {dtype}: {comparison.message()}"


def codes(implementation, scheme):
    """Every code at places of a vector's parts: NaN and infinity too."""
    table = decode_table(scheme.format)
    for column in (5, K - 1):
        of_row = torch.zeros(len(table), K, dtype=torch.uint8)
        of_row[:, column] = torch.arange(len(table))
        weight = QuantizedWeight.from_codes(of_row, Scales(torch.ones(len(table), 1)), scheme)
        x = torch.zeros(1, K, dtype=BF16)
        x[0, column] = 1
        for m in (1, 2, 17):
            row = implementation.matmul(x.repeat(m, 1), weight)[0].float()
            if not torch.equal(row.nan_to_num(9e9), table.nan_to_num(9e9)):
                yield f"{scheme.name}, M = {m}: codes {(row != table).nonzero().flatten().tolist()} at {column}"


def main(names):
    torch.manual_seed(0)
    torch.set_num_threads(1)        # threads that wait for each other are slow on a busy machine
    implementation = discover()[0]["cpu_fused"]()
    print(torch.backends.cpu.get_cpu_capability())
    for scheme in map(scheme_named, names):
        for problem in products(implementation, scheme):
            print(problem)
        if scheme.scaling.name == "row":
            for problem in codes(implementation, scheme):
                print(problem)


main(sys.argv[1:])
