"""Recover every map that an implementation applies, and name the fault in each."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fpxbench.diagnosis.decode_fault import DecodeFault
from fpxbench.diagnosis.decode_faults import block_of, block_row_of
from fpxbench.diagnosis.diagnosis import Diagnosis
from fpxbench.diagnosis.experiment import Experiment
from fpxbench.diagnosis.hypotheses import Faults
from fpxbench.diagnosis.index_map import IndexMap, axis_rule
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.code_order import recover_order
from fpxbench.diagnosis.recovery.decode_table import effective_table, gives_table, recover_table
from fpxbench.diagnosis.recovery.scale_blocks import BlockMap, constants, recover_blocks
from fpxbench.diagnosis.recovery.scale_factors import Factors, gives_factors, recover_scales
from fpxbench.diagnosis.recovery.scale_precision import recover_precision
from fpxbench.records.kinds import Kind

NUMERALS = {2: "two", 3: "three", 4: "four"}

_LISTED_ROWS = 4
"""Moved rows that a message lists one by one, at most."""


class RecoveredMaps:
    """The maps of an implementation on one shape: code -> number, block -> scale, scale -> factor, weight -> code.

    seconds : no further experiment begins after this long; `complete` is then False
    """

    def __init__(self, bench: Bench, seconds: float = float("inf")) -> None:
        self.bench = bench
        self.table: Tensor | None = None
        self.factors: Factors | None = None
        self.blocks: BlockMap | None = None
        self.order: IndexMap | None = None
        self.experiments: list[Experiment] = []
        self.complete = False
        deadline = time.monotonic() + seconds
        bench.choose_unit()
        bench.unscaled |= constants(bench, bench.fmt.max_code, 1.0).isfinite()
        table, decoded = recover_table(bench)
        self.table = table if decoded.right is not None else None
        self.experiments.append(decoded)
        if time.monotonic() > deadline:
            return
        blocks, self.blocks = recover_blocks(bench, table)
        if time.monotonic() > deadline:
            self.experiments.append(blocks)
            return
        scales, self.factors = recover_scales(bench, table, blocks.right is True, self.blocks)
        if self.factors is not None and self.factors.holds_common_factor(table):
            self.experiments[0] = Experiment(
                name="table", right=True, tried=decoded.tried,
                message=f"all {decoded.tried} codes decode to their definition, times one factor of the scale"
            )
            self.table = None
        self.experiments += [scales, blocks]
        if bench.implementation.slow(bench.device):
            return
        if time.monotonic() < deadline:
            order, self.order = recover_order(bench, table)
            self.experiments.append(order)
            self.complete = True
        if self.all_right and (precision := recover_precision(bench)) is not None:
            self.experiments.append(precision)

    @property
    def wrong(self) -> list[Experiment]:
        return [experiment for experiment in self.experiments if experiment.right is False]

    @property
    def all_right(self) -> bool:
        """Whether every map was recovered and is right."""
        return self.complete and all(experiment.right for experiment in self.experiments)

    def contradict(self, faults: Faults, shape: tuple[int, int]) -> bool:
        """Return whether a recovered map differs from the one that `faults` give on a weight of this shape."""
        right = {experiment.name: experiment.right for experiment in self.experiments}
        steps = {getattr(one, "step", "stored") for one in faults}
        numbers_right = right.get("table") is True and right.get("scales") is True
        # Bits exchanged within each code look like another table.
        return bool("codes" in steps and right.get("order") is True and right.get("table") is True
                    or steps & {"places", "blocks"} and right.get("blocks") is True
                    or steps & {"table", "scales"} and numbers_right
                    or self.table is not None and not gives_table(self.bench, faults, self.table)
                    or not self._gives_factors(faults)
                    or tuple(shape) == (self.bench.n, self.bench.k) and not self._gives_places(faults))

    def _gives_factors(self, faults: Faults) -> bool:
        if self.factors is None or any(not isinstance(one, DecodeFault) for one in faults):
            return True
        block, tensor = self.factors.values, torch.ones(1, dtype=torch.float64)
        for one in faults:
            if isinstance(one, DecodeFault) and one.step == "scales":
                block, tensor = one.apply(block, tensor)
        return gives_factors(self.bench, effective_table(self.bench, faults), block * tensor, self.factors)

    def _gives_places(self, faults: Faults) -> bool:
        places = [one for one in faults if isinstance(one, DecodeFault) and one.step in ("places", "blocks")]
        if self.blocks is None or any(not isinstance(one, DecodeFault) for one in faults):
            return True
        bench, columns = self.bench, torch.arange(self.bench.k)
        rows, blocks = bench.grid_shape
        grid = torch.arange(1, rows * blocks + 1, dtype=torch.float64).reshape(rows, blocks)
        met = None
        for one in sorted(places, key=lambda one: one.step == "blocks"):
            if one.step == "places":
                grid = one.apply(grid)
            else:
                met = one.apply(grid, columns, torch.arange(bench.n))
        if met is None:
            met = grid[block_row_of(torch.arange(bench.n), bench.scaling)][:, block_of(columns, bench.scaling)]
        wanted = met.expand(bench.n, bench.k).long() - 1
        return bool((wanted == self.blocks.place)[self.blocks.free].all())

    def diagnosis(self) -> Diagnosis | None:
        """Return the faults of all wrong maps, as their experiments name them; None unless every one has a name."""
        wrong = self.wrong
        if not wrong or any(not experiment.kinds for experiment in wrong):
            return None
        named = [(list(experiment.kinds), experiment.message) for experiment in wrong]
        if (moved := self._outputs_moved()) is not None:    # one fault that shows in two maps
            named = [([Kind.OUTPUT_PERMUTED], moved), *((list(one.kinds), one.message) for one in wrong
                                                        if one.name not in ("order", "blocks"))]
            if self.blocks is not None and self.blocks.constant:
                named.append(([Kind.SCALE_MISSING], self.blocks.constant))
        elif not self._knows("order") and self._rows_meet_other_rows() \
                and not any(Kind.SCALE_SWIZZLED in one.kinds for one in wrong):     # swizzled scales move no outputs
            return Diagnosis(None, "cannot tell between output_permuted, scale_permuted: rows meet the scales of other"
                             " rows, and whether they meet their codes too was not asked", {
                                 "fitting": [str(Kind.OUTPUT_PERMUTED), str(Kind.SCALE_PERMUTED)],
                                 "experiments": self.evidence()})
        kinds = list(dict.fromkeys(kind for of_one, _ in named for kind in of_one))
        message = "; and ".join(message for _, message in named)
        if self.blocks is not None and self.blocks.constant:
            message = message.replace("every weight is", "every other weight is")
        count = "" if len(kinds) == 1 else f"{NUMERALS.get(len(kinds), len(kinds))} faults at once: "
        return Diagnosis(kinds[0], count + message, {"kinds": sorted(map(str, kinds)), "experiments": self.evidence()})

    def _outputs_moved(self) -> str | None:
        """Return the rule of moved output features: rows whose codes and scales both come from the same other row."""
        if self.order is None or (source := self.order.rows_moved()) is None:
            return None
        scaling, count = self.bench.scaling, len(source)
        if scaling.block_rows is not None:
            if self.blocks is None:
                return None
            blocks = self.bench.grid_shape[1]
            columns = block_of(torch.arange(self.bench.k), scaling)
            wanted = block_row_of(source, scaling)[:, None] * blocks + columns[None, :]
            if not bool((wanted == self.blocks.place)[self.blocks.free].all()):
                return None
        rule = axis_rule(source)
        moved = int((source != torch.arange(count)).sum())
        if rule is not None:
            what = f"feature n is that of row {rule.format(i='n')}"
        elif moved <= _LISTED_ROWS:
            what = ", ".join(f"feature {n} is that of row {int(source[n])}"
                             for n in (source != torch.arange(count)).nonzero().reshape(-1).tolist())
        else:
            what = "by no simple rule"
        return f"{moved} of {count} output features are those of other rows, codes and scales alike: {what}"

    def _knows(self, name: str) -> bool:
        """Return whether the experiment of that name recovered its map."""
        return any(one.name == name and one.right is not None for one in self.experiments)

    def _rows_meet_other_rows(self) -> bool:
        """Return whether each row meets the scales of a single row, block for block, and some rows those of another
        row, as with moved outputs."""
        if self.blocks is None:
            return False
        blocks, place, free = self.bench.grid_shape[1], self.blocks.place, self.blocks.free
        columns = block_of(torch.arange(self.bench.k), self.bench.scaling)[None, :].expand(place.shape)
        source = torch.where(free, place // blocks, -1).amax(dim=1, keepdim=True)
        other = (source[:, 0] >= 0) & (source[:, 0] != block_row_of(torch.arange(len(source)), self.bench.scaling))
        met = (place >= 0) & (place // blocks == source) & (place % blocks == columns)
        return bool((met | ~free).all() and other.any())

    def messages(self) -> str:
        """Return a clause for each wrong map; if none is wrong, which maps are right and which are unknown."""
        if self.wrong:
            return "; ".join(f"{experiment.name}: {experiment.message}" for experiment in self.wrong)
        clauses = [(what, [one.name for one in self.experiments if one.right is right])
                   for what, right in (("as defined", True), ("not recovered", None))]
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in clauses if names) or "no map was recovered"

    def evidence(self) -> dict[str, str]:
        return {experiment.name: experiment.message for experiment in self.experiments}
