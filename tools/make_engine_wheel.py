"""Pack the lab's simulated engine as a wheel that is installed like the real one: by name, version and hash.

    python make_engine_wheel.py FOLDER                    writes the wheel into FOLDER
    python make_engine_wheel.py --requirements FILE       writes the requirement that pins it

The same sources give the same bytes, so the hash can stand in a committed file and in every fleet's lock. No index has
the wheel: set-up makes it and installs it without any.
"""

import base64
import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "src/gpuyard/lab/engine"
NAME = "vllm-sim"
# By this path the unit starts an engine, whichever it is.
START = "vllm/entrypoints/openai/api_server.py"
STARTS = 'from vllm_sim.server import main\n\nif __name__ == "__main__":\n    main()\n'


def version() -> str:
    """That of the vLLM it stands for."""
    found = re.search(r'^VERSION = "([0-9.]+)"$', (SOURCE / "server.py").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f'ENGINE-VERSION: {SOURCE / "server.py"} has no line VERSION = "…"; put it back')
    return found[1]


def wheel() -> tuple[str, bytes]:
    """Its file name and its bytes."""
    distribution = f"{NAME.replace('-', '_')}-{version()}"
    about = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version()}\nLicense-Expression: Apache-2.0\n"
    files = {f"vllm_sim/{path.name}": path.read_bytes() for path in sorted(SOURCE.glob("*.py"))}
    files.update({f"{folder}/__init__.py": b"" for folder in ("vllm", "vllm/entrypoints", "vllm/entrypoints/openai")})
    files[START] = STARTS.encode()
    files[f"{distribution}.dist-info/METADATA"] = about.encode()
    files[f"{distribution}.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{distribution}.dist-info/RECORD"
    lines = [f"{name},sha256={coded(content)},{len(content)}" for name, content in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    packed = io.BytesIO()
    # Stored and dated alike: what packs differs from machine to machine.
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, content)
    return f"{distribution}-py3-none-any.whl", packed.getvalue()


def coded(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def requirement() -> str:
    digest = hashlib.sha256(wheel()[1]).hexdigest()
    return (
        "# Written by `make lock-engine-sim` from src/gpuyard/lab/engine: no index has this wheel, set-up makes it.\n"
        f"{NAME}=={version()} \\\n    --hash=sha256:{digest}\n"
    )


def main(arguments: list) -> None:
    if len(arguments) == 2 and arguments[0] == "--requirements":
        Path(arguments[1]).write_text(requirement(), encoding="utf-8")
    elif len(arguments) == 1:
        name, content = wheel()
        (Path(arguments[0]) / name).write_bytes(content)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
