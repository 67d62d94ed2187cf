"""Case: implementation × scheme × workload × activation dtype, with a stable, readable id."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    computed_field,
    model_serializer,
    model_validator,
)

from fpxbench.records.fields import Dimension, Tokens

Activation = Literal["bf16", "fp16"]

Part = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=80)]
"""A part of an id, which becomes a file name and a link."""
SchemePart = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", max_length=80)]
"""Like `Part`; a + joins the weight's format and the activations'."""


class Routing(StrEnum):
    """The distribution of tokens over experts. `fpxbench.checking.routing` draws one from a seed."""

    UNIFORM = "uniform"
    """Each token to different experts, all equally likely."""
    SKEWED = "skewed"
    """Each token to different experts, the expert of rank r with a probability proportional to 1/r."""
    EMPTY = "empty"
    """Uniform, but the first, the last and the middle expert get no tokens."""
    ONE = "one"
    """Every row to one expert."""


_OF_EXPERTS = ("experts", "experts_per_token", "routing")


class Case(BaseModel):
    """One implementation, scheme, workload and activation dtype to check and time. Self-contained; stored as JSON.

    If `experts` is given, the weight is [E, N, K], and each of M tokens is multiplied by `experts_per_token` experts:
    M x `experts_per_token` rows, sorted by expert. Other cases do not have these fields in JSON.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    implementation: Part
    scheme: SchemePart
    workload: Part
    m: Tokens
    n: Dimension
    k: Dimension
    activation: Activation = "bf16"
    experts: Dimension | None = None
    experts_per_token: Dimension | None = None
    routing: Routing | None = None

    @model_validator(mode="after")
    def _experts_are_complete(self) -> Self:
        given = [getattr(self, name) is not None for name in _OF_EXPERTS]
        if any(given) and not all(given):
            raise ValueError("a case with experts needs experts, experts_per_token and routing")
        if self.experts and self.experts_per_token and self.experts_per_token > self.experts:
            raise ValueError(f"{self.experts_per_token} experts per token, but only {self.experts} experts")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_experts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        return {name: value for name, value in fields.items() if value is not None or name not in _OF_EXPERTS}

    @property
    def shape(self) -> str:
        """The sizes for display: ``M = 16, N = 5760, K = 2880, 32 experts, 4 a token, uniform``."""
        experts = f", {self.experts} experts, {self.experts_per_token} a token, {self.routing}" if self.experts else ""
        return f"M = {self.m}, N = {self.n}, K = {self.k}{experts}"

    @property
    def rows(self) -> int:
        """Number of rows that are multiplied: M, or with experts M x `experts_per_token`."""
        return self.m * (self.experts_per_token or 1)

    @property
    def weights(self) -> int:
        """Number of stored weights: N x K, times the number of experts."""
        return self.n * self.k * (self.experts or 1)

    @property
    def of_one_expert(self) -> Case:
        """The same case with the weight of one expert, [N, K], and without a routing."""
        return self.model_copy(update=dict.fromkeys(_OF_EXPERTS))

    @computed_field
    @property
    def id(self) -> str:
        """``triton_fused/e4m3fn-row/llama2-7b.qkv/m1/bf16``."""
        return f"{self.implementation}/{self.scheme}/{self.workload}/m{self.m}/{self.activation}"

    @property
    def slug(self) -> str:
        """The id as a file name."""
        return self.id.replace("/", "__")

    @property
    def layer(self) -> str:
        """The layer that implementations are compared on: ``llama2-7b.qkv/m1/bf16``."""
        return f"{self.workload}/m{self.m}/{self.activation}"


def split_id(case_id: str) -> dict[str, str]:
    """Return the parts of a case id by name. Raise ValueError if `case_id` is not one."""
    match = re.fullmatch(
        r"(?P<implementation>[^/]+)/(?P<scheme>[^/]+)/(?P<workload>[^/]+)/m(?P<m>\d+)/(?P<activation>bf16|fp16)",
        case_id,
    )
    if match is None:
        raise ValueError(f"{case_id!r} is not a case id: IMPLEMENTATION/SCHEME/WORKLOAD/mM/bf16, "
                         "as `fpxbench list cases` prints")
    return match.groupdict()
