"""Case: implementation × scheme × workload × activation dtype, with a stable, readable id."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

Activation = Literal["bf16", "fp16"]

_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"


class Case(BaseModel):
    """One thing to check and time. Serialises as JSON; self-contained (N and K are its own, not looked up)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # Ids become file names and links: a record from another machine must not smuggle a path or a tag through them.
    implementation: str = Field(pattern=_NAME, max_length=80)
    scheme: str = Field(pattern=_NAME, max_length=80)
    workload: str = Field(pattern=_NAME, max_length=80)
    m: int = Field(ge=0)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
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
    """The parts of a case id. Raises ValueError if it is not one."""
    match = re.fullmatch(
        r"(?P<implementation>[^/]+)/(?P<scheme>[^/]+)/(?P<workload>[^/]+)/m(?P<m>\d+)/(?P<activation>bf16|fp16)", case_id
    )
    if match is None:
        raise ValueError(f"{case_id!r} is not a case id: IMPLEMENTATION/SCHEME/WORKLOAD/mM/bf16, as `fpxbench list cases` prints")
    return match.groupdict()
