"""Parent and small types of every document: closed, frozen, in plain units."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NODE_NAME_PATTERN = r"^[a-z][a-z0-9-]{0,62}$"

NodeName = Annotated[str, Field(pattern=NODE_NAME_PATTERN)]
# A node is called <fleet>-<pool>-<index>; these lengths keep that within the 63 characters of a host name.
FleetName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,22}[a-z0-9])?$")]
PoolName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$")]
Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,46}[a-z0-9])?$")]
GpuName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,47}$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Dotted = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)*$")]
DriverBranch = Annotated[str, Field(pattern=r"^[0-9]{3}$")]
DriverVersion = Annotated[str, Field(pattern=r"^[0-9]{3}(\.[0-9]{1,3}){1,2}$")]


class Closed(BaseModel):
    """Unknown keys are refused, nothing is converted, nothing is changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def digest_of(data: object) -> str:
    """Digest of plain data, whatever the order of its keys and the layout of its file."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
