"""The blocks and scales of each scaling; a new family needs a subclass and nothing else."""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from subprocess import run
from sys import executable

import pytest
import torch
from places import DOCS

from fpxbench.numbers import scaling as scalings
from fpxbench.numbers.formats import FORMATS, format_named
from fpxbench.numbers.scaling import FAMILIES, Scaling, scaling_named
from fpxbench.numbers.scaling.scale_format import E8M0_SCALE, ScaleFormat
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.tensor_codec import decode

NAMES = ("tensor", "row", "g128", "g5", "b4x3", "mx", "nv")


@dataclass(frozen=True)
class Blocks(Scaling):
    """A family that the table does not have."""

    kind = "block"


B2X3 = Blocks(2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_one_family_parses_each_name(name):
    assert scaling_named(name).name == name
    assert [family.parse(name) for family in FAMILIES].count(None) == len(FAMILIES) - 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_each_family_has_a_description_and_a_source(family):
    assert family.description and family.source


def test_every_scaling_of_the_package_is_a_family_that_is_tried_and_documented():
    modules = [import_module(f"{scalings.__name__}.{module.name}") for module in iter_modules(scalings.__path__)]
    defined = {one for module in modules for one in vars(module).values()
               if isinstance(one, type) and issubclass(one, Scaling) and one is not Scaling}
    assert defined == set(FAMILIES) == {type(scaling_named(name)) for name in NAMES}
    table = (DOCS / "schemes.md").read_text(encoding="utf-8").partition("\n## Scalings")[2].partition("\n\n#")[0]
    documented = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)))
    families = {type(scaling_named(re.sub("[NRC]", "4", name))) for name in documented}
    assert families == set(FAMILIES), "docs/schemes.md has a row for each under Scalings"
    with pytest.raises(ValueError) as unknown:
        scaling_named("unknown")
    assert set(documented) <= set(re.findall(r"\w+", str(unknown.value))), "the message of an unknown name lists all"


@pytest.mark.parametrize(
    ("name", "grid"), [("tensor", (1, 1)), ("row", (7, 1)), ("g128", (7, 3)), ("mx", (7, 10)), ("nv", (7, 19))]
)
def test_the_grid_has_a_scale_for_each_block_the_last_of_which_may_be_short(name, grid):
    scaling = scaling_named(name)
    assert scaling.grid_shape(7, 300) == grid == tuple(scaling.block_amax(torch.ones(7, 300)).shape)
    assert scaling.block_index(7, 300).unique().tolist() == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("scaling", [*map(scaling_named, NAMES), B2X3, Blocks(4, None)],
                         ids=lambda scaling: f"{scaling.name}-{scaling.block_rows}x{scaling.block}")
def test_factors_are_spread_amax_is_taken_and_bits_are_counted_by_the_block_index(scaling):
    n, k = 7, 41
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    index, (rows, blocks) = scaling.block_index(n, k), scaling.grid_shape(n, k)
    factors = torch.rand(rows, blocks)
    assert torch.equal(scaling.spread(factors, n, k), factors.flatten()[index])
    amax = torch.stack([weight[index == block].abs().max() for block in range(rows * blocks)]).reshape(rows, blocks)
    assert torch.equal(scaling.block_amax(weight), amax)
    stored = scaling.choose(weight, FORMATS["e4m3fn"])
    tensors = [stored.stored] + [stored.tensor_scale] * scaling.has_tensor_scale
    assert scaling.bits_per_weight(n, k) == pytest.approx(8 * sum(tensor.nbytes for tensor in tensors) / (n * k))


def test_blocks_in_two_dimensions_quantize_and_dequantize():
    scheme = Scheme("e4m3fn-b2x3", FORMATS["e4m3fn"], B2X3)
    weight = torch.tensor([[1.0, 2, 3, 30, 40], [4, 5, 7, 60, 10], [-700, 0, 100, 1, 2]])
    codes, scales = scheme.quantize(weight)
    assert torch.equal(scales.stored * 448, torch.tensor([[7.0, 60], [700, 2]]))
    assert torch.equal(decode(codes, scheme.format).abs()[[1, 1, 2, 2], [2, 3, 0, 4]], torch.full((4,), 448.0))
    assert torch.allclose(scheme.dequantize(codes, scales), weight, rtol=2**-4)


def test_a_scale_may_be_stored_in_any_format_of_eight_bits():
    scaling = Blocks(2, 3, ScaleFormat(format_named("ue4m4")))
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    scales = scaling.choose(weight, FORMATS["e2m1"])
    assert scales.stored.dtype == torch.uint8
    assert torch.allclose(scaling.factors(scales), scaling.block_amax(weight) / 6, rtol=2**-5)


@pytest.mark.parametrize("name", NAMES)
def test_scales_can_be_set_by_their_numbers_and_are_read_back_level_by_level(name):
    scaling = scaling_named(name)
    numbers = torch.ldexp(torch.ones(4, 3), torch.arange(12).reshape(4, 3) - 6)
    scales = scaling.scales_from(numbers)
    block, whole = scaling.levels(scales)
    assert torch.equal(block, numbers) and whole.tolist() == [1.0] and torch.equal(scaling.factors(scales), numbers)
    if scaling.has_tensor_scale:
        scales.tensor_scale.fill_(3)
        assert scaling.levels(scales)[1].tolist() == [3.0] and torch.equal(scaling.factors(scales), 3 * numbers)


@pytest.mark.parametrize("name", ["e4m3fn-tensor", "e4m3fn-row", "e3m2-g128", "e5m2-mx", "mxfp4"])
def test_the_reach_of_a_scheme_is_the_largest_weight_under_a_scale_of_one(name):
    scheme = scheme_named(name)
    reach = scheme.scaling.reach(scheme.format)
    below, above = (torch.tensor([[reach * (1 + step)]]) for step in (-2.0**-20, 2.0**-20))
    assert scheme.scaling.factors(scheme.scaling.choose(below, scheme.format)).item() <= 1
    assert scheme.scaling.factors(scheme.scaling.choose(above, scheme.format)).item() > 1


def test_e8m0_scales_are_rounded_down():
    assert E8M0_SCALE.decode(E8M0_SCALE.encode(torch.tensor([1.0, 1.99, 2.0]))).tolist() == [1.0, 1.0, 2.0]


def test_schemes_and_scalings_are_known_without_torch():
    code = ("import sys; from fpxbench.numbers.scheme import SCHEMES, scheme_named;"
            "print(sum(scheme_named(s).bits_per_weight(8, 8) for s in SCHEMES)); assert 'torch' not in sys.modules")
    assert run([executable, "-c", code], check=False).returncode == 0


def test_nothing_in_the_library_compares_the_kind_of_a_scaling():
    root = Path(scalings.__file__).parents[2]
    files = [path for path in root.rglob("*.py") if "scaling" not in path.parts]
    assert [
        path.name for path in files if "scaling.kind ==" in path.read_text() or "scaling.kind in" in path.read_text()
    ] == []
