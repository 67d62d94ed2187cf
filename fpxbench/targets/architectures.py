"""The GPU architectures that kernels are compiled for."""

from __future__ import annotations

import fnmatch

from pydantic import BaseModel, ConfigDict


class Architecture(BaseModel):
    """A GPU architecture, by its compiler's name."""

    model_config = ConfigDict(frozen=True)

    name: str
    """``sm_90``, ``gfx942``."""
    generation: str
    """``Hopper``, ``CDNA 3``."""
    cards: str
    """Some well-known models."""

    @property
    def vendor(self) -> str:
        return "nvidia" if self.name.startswith("sm_") else "amd"

    @property
    def target(self) -> dict[str, str | int]:
        """The fields of Triton's ``GPUTarget``: backend, arch and warp size (RDNA has waves of 32, CDNA of 64)."""
        if self.vendor == "nvidia":
            return {"backend": "cuda", "arch": int(self.name.removeprefix("sm_")), "warp_size": 32}
        return {"backend": "hip", "arch": self.name, "warp_size": 32 if self.generation.startswith("RDNA") else 64}

    @property
    def capability(self) -> int | None:
        """90 for sm_90; None on AMD."""
        return int(self.name.removeprefix("sm_")) if self.vendor == "nvidia" else None


ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(name=name, generation=generation, cards=cards)
    for name, generation, cards in (
        ("sm_80", "Ampere", "A100, A30"), ("sm_86", "Ampere", "RTX 3060 to 3090, A10, A40, RTX A6000"),
        ("sm_89", "Ada", "RTX 4060 to 4090, L4, L40S"), ("sm_90", "Hopper", "H100, H200, GH200"),
        ("sm_100", "Blackwell", "B100, B200, GB200"), ("sm_103", "Blackwell", "B300, GB300"),
        ("sm_120", "Blackwell", "RTX 5060 to 5090, RTX PRO 6000"), ("gfx90a", "CDNA 2", "MI210, MI250, MI250X"),
        ("gfx942", "CDNA 3", "MI300A, MI300X, MI325X"), ("gfx950", "CDNA 4", "MI350X, MI355X"),
        ("gfx1100", "RDNA 3", "RX 7900 XT, RX 7900 XTX, PRO W7900"),
        ("gfx1201", "RDNA 4", "RX 9070, RX 9070 XT, AI PRO R9700")
    )
}


def architectures_like(globs: list[str] | tuple[str, ...]) -> list[Architecture]:
    """Return the architectures that match any of the globs; all if there are none.

    Raises ValueError for a glob that matches none.
    """
    for glob in globs:
        if not fnmatch.filter(ARCHITECTURES, glob):
            raise ValueError(f"no architecture {glob!r}: one of {', '.join(ARCHITECTURES)}")
    return [arch for name, arch in ARCHITECTURES.items()
            if not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
