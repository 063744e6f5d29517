"""The paper's recipes: each is loaded, resolved and dry-run, at the architectures' sizes, without any weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from benchmarks import predict
from carft_fast.config.methods import method_name
from carft_fast.config.toml import load_config
from carft_fast.core.console import Console
from carft_fast.core.errors import InputError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.training.pipeline import describe_plan, prepare

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs" / "paper").glob("*.toml"))
MODELS = {"codellama_7b": predict.MODELS["CodeLlama-7B"], "qwen2.5_7b": predict.MODELS["Qwen2.5-7B-Instruct"]}
WEIGHTS = {"codellama_7b": 6_738_546_688, "qwen2.5_7b": 7_615_616_512}  # by hand, from the sizes
DATA = {"svamp": ("svamp_nl.json", "svamp_test_set.json"), "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test_set.json")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Config and tokenizer of each model, no weights file."""
    found = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        config.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        found[name] = folder
    return found


def plan(recipe: Path, folder: Path, files: tuple[Path, Path], *options: str) -> str:
    stage = "sft" if recipe.stem.endswith("_sft") else "rl"
    config = load_config(
        str(recipe), [f"model.path={folder}", f"data.train={files[0]}", f"data.eval={files[1]}", *options]
    )
    prepared = prepare(config, folder / "run", Console(), stages=(stage,), dry_run=True)
    wide = RichConsole(width=250)
    with wide.capture() as capture:
        wide.print(describe_plan(prepared, (stage,)))
    assert not (folder / "run").exists()
    return capture.get()


def test_there_are_sixteen() -> None:
    assert len(RECIPES) == 16


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dry_run(recipe: Path, folders: dict[str, Path], shared_data: Callable[[str], Path]) -> None:
    task, _, rest = recipe.stem.partition("_")
    model = next(name for name in MODELS if rest.startswith(name))
    method = rest.removeprefix(model + "_")
    files = tuple(shared_data(name) for name in DATA[task])
    text = plan(recipe, folders[model], (files[0], files[1]), "data.train_rows=640", "data.eval_rows=50")
    config = load_config(str(recipe))
    if method == "sft":
        assert "20 steps of 64 sequences, 2.00 epochs" in text
        assert config.sft.lr == 1e-5
    else:
        assert method_name(config) == method
        assert (config.rl.lr, config.rl.batch_size, config.rl.epochs, config.data.max_length) == (3e-7, 64, 70, 1024)
        assert (f"{2800 if method == 'dr_grpo' else 700} steps of 64 sequences, 70.00 epochs") in text
    if method == "carft":
        assert (config.contrastive.coef, config.contrastive.temperature) == (1e-3, 0.2)
    assert f"{WEIGHTS[model]:,} weights" in text
    assert f"{WEIGHTS[model] * 4 / 2**30:.1f} GiB = weights x 4 bytes" in text
    assert ("reference" in text) == (method in ("reft", "carft"))


def test_the_whole_set_has_the_papers_number_of_steps(
    folders: dict[str, Path], shared_data: Callable[[str], Path]
) -> None:
    recipe = next(path for path in RECIPES if path.stem == "svamp_codellama_7b_carft")
    text = plan(recipe, folders["codellama_7b"], (shared_data("svamp_nl.json"), shared_data("svamp_test_set.json")))
    assert "3365 steps of 64 sequences" in text  # 70 x 3,076 / 64
    assert "1000 rows" in text


def test_training_needs_the_weights(folders: dict[str, Path], shared_data: Callable[[str], Path]) -> None:
    options = [f"data.train={shared_data('svamp_nl.json')}", f"data.eval={shared_data('svamp_test_set.json')}"]
    config = load_config(str(RECIPES[0]), [f"model.path={folders['codellama_7b']}", *options])
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        prepare(config, folders["codellama_7b"] / "run", Console(), stages=("sft",))
