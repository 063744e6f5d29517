"""The name `kernels` belongs to a package on the index that transformers imports; ours must never shadow it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_from_root(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_transformers_models_import_from_the_repository_root() -> None:
    assert (
        run_from_root("from transformers import Qwen2ForCausalLM; print(Qwen2ForCausalLM.__name__)")
        == "Qwen2ForCausalLM"
    )


def test_kernels_is_not_a_regular_package_of_ours() -> None:
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    origin = run_from_root(code)
    assert not origin.startswith(str(ROOT))
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if path.suffix == ".py"] == []


def test_operators_need_nothing_of_the_trainer() -> None:
    """carft_kernels imports with torch (and triton) alone."""
    code = (
        "import sys, carft_kernels\n"
        "trainer = {'transformers', 'pydantic', 'typer', 'rich', 'safetensors', 'datasets', 'carft_fast'}\n"
        "print(sorted(trainer & set(sys.modules)))"
    )
    assert run_from_root(code) == "[]"


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, carft_fast.cli\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    assert run_from_root(code) == "[]"


def test_models_are_loaded_and_saved_without_deepspeed(tmp_path: Path) -> None:
    """Also with adapters; it is installed here, and half a second of a start."""
    code = (
        "import sys, importlib.util, torch\n"
        "from pathlib import Path\n"
        "from carft_fast.config import load_config\n"
        "from carft_fast.models import load_model\n"
        "assert importlib.util.find_spec('deepspeed')\n"
        "for rank in (0, 2):\n"
        "    config = load_config(None, [f'lora.rank={rank}'])\n"
        "    model = load_model(config, 'synthetic', torch.device('cpu'), heads=True)\n"
        f"    model.save(Path({str(tmp_path)!r}) / str(rank))\n"
        f"    model.lm.save_pretrained(Path({str(tmp_path)!r}) / f'checkpoint-{{rank}}')\n"
        "print('deepspeed' in sys.modules)"
    )
    assert run_from_root(code) == "False"
