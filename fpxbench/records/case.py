"""Case: implementation × scheme × workload × activation dtype, with a stable, readable id."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from fpxbench.records.fields import Dimension, Tokens

Activation = Literal["bf16", "fp16"]

Part = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=80)]
"""Of an id, which becomes a file name and a link."""
SchemePart = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", max_length=80)]
"""Like `Part`; a + joins the weight's and the activations'."""


class Case(BaseModel):
    """One thing to check and time. Serialises as JSON; self-contained (N and K are its own, not looked up)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    implementation: Part
    scheme: SchemePart
    workload: Part
    m: Tokens
    n: Dimension
    k: Dimension
    activation: Activation = "bf16"

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
        """What implementations compete on: ``llama2-7b.qkv/m1/bf16``."""
        return f"{self.workload}/m{self.m}/{self.activation}"


def split_id(case_id: str) -> dict[str, str]:
    """Return the parts of a case id. Raise ValueError if it is not one."""
    match = re.fullmatch(
        r"(?P<implementation>[^/]+)/(?P<scheme>[^/]+)/(?P<workload>[^/]+)/m(?P<m>\d+)/(?P<activation>bf16|fp16)",
        case_id,
    )
    if match is None:
        raise ValueError(f"{case_id!r} is not a case id: IMPLEMENTATION/SCHEME/WORKLOAD/mM/bf16, "
                         "as `fpxbench list cases` prints")
    return match.groupdict()
