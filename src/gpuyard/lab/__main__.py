"""One call of the lab with root's rights: JSON on standard input, JSON on standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpuyard.lab.errors import LabError
from gpuyard.lab.models import LabRef
from gpuyard.lab.operations import CALLS, plain
from gpuyard.lab.place import Place


def main() -> None:
    request = json.load(sys.stdin)
    try:
        place = Place(LabRef.model_validate(request["lab"]), Path(request["cache"]))
        answer = {"result": plain(CALLS[request["call"]](place, **request["arguments"]))}
    except LabError as error:
        answer = {"error": {"rule": error.rule, "found": error.found, "why": error.why, "change": error.change}}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
