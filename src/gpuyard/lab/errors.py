"""What the lab refuses, as part of the one tree of refusals."""

from __future__ import annotations

from gpuyard.spec.errors import RefusedError


class LabError(RefusedError):
    """A lab that cannot be made, or a part of it that does not come up. Where a cause says all, there is no `why`."""

    def __init__(self, rule: str, found: str, why: str = "", change: str = "") -> None:
        super().__init__(rule, found, why, change)

    def __str__(self) -> str:
        said = ": ".join(part for part in (self.rule, self.found, self.why) if part)
        return f"{said}; {self.change}" if self.change else said
