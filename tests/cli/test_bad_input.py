"""Bad input through the command line: exit code 2, one readable message naming the thing, nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models

from carft_fast.__main__ import main
from carft_fast.config.toml import load_config, to_toml

ROWS = [
    {"item_id": f"r{i}", "question": f"What is {i} + 1 ?", "answer_cot": "add one", "answer_value": str(i + 1)}
    for i in range(8)
]


class Outcome:
    def __init__(self, code: int, output: str, error: str) -> None:
        self.code, self.output, self.error = code, output, error


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command in a clean working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as `main` does, but for this test alone

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["carft-fast", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def sets(**values: str) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


# case -> (words of the command line, what the message must contain)
CONFIG_CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (sets(rl__learning_rate="1"), ["rl.learning_rate", "unknown key"]),
    "misspelt key": (sets(rollout__temprature="1"), ["rollout.temprature", "did you mean rollout.temperature"]),
    "misspelt section": (sets(rolout__temperature="1"), ["rolout", "did you mean rollout"]),
    "negative learning rate": (sets(sft__lr="-1"), ["sft.lr = -1", "greater than 0"]),
    "zero batch": (sets(rl__batch_size="0"), ["rl.batch_size = 0", "greater than or equal to 1"]),
    "word for a number": (sets(rl__max_steps="many"), ['rl.max_steps = "many"', "integer"]),
    "float for an integer": (sets(rl__ppo_epochs="1.5"), ["rl.ppo_epochs = 1.5", "integer"]),
    "number for a switch": (sets(rl__whiten_advantages="3"), ["rl.whiten_advantages = 3", "boolean"]),
    "gamma above one": (sets(rl__gamma="1.1"), ["rl.gamma = 1.1", "less than or equal to 1"]),
    "not a number": (sets(rl__kl_coef="nan"), ["rl.kl_coef", "finite"]),
    "unknown choice": (sets(model__value_head="both"), ["model.value_head", "'shared' or 'separate'"]),
    "unknown engine": (sets(rollout__engine="sglang"), ["rollout.engine", "'hf'"]),
    "mini-batch above batch": (sets(rl__mini_batch_size="65"), ["rl.mini_batch_size = 65", "rl.batch_size = 64"]),
    "group does not divide": (sets(rollout__samples_per_prompt="3"), ["rl.batch_size = 64", "samples_per_prompt = 3"]),
    "flash attention in float32": (
        sets(model__attention="flash_attention_2"),
        ['model.attention = "flash_attention_2"', 'model.compute_dtype = "bfloat16"'],
    ),
    "no room for the prompt": (
        sets(rollout__max_new_tokens="1024"),
        ["rollout.max_new_tokens = 1024", "data.max_length = 1024"],
    ),
    "set without a value": (["--set", "rl.lr"], ["--set rl.lr", "section.key=value"]),
    "value used as a section": (["--set", "seed=1", "--set", "seed.x=2"], ["seed"]),
    "half synthetic": (sets(data__train="synthetic"), ["data.train", "data.eval"]),
    "run name with a slash": (sets(output__name="a/b"), ["output.name"]),
    "run name that leads out of runs": (sets(output__name=".."), ["output.name"]),
    "two lines": (["--set", "rl.lr=1e-3\nseed=5"], ["--set", "one value is expected"]),
    "bytes that are no text": (sets(model__path="a\udcff"), ['model.path = "a\\udcff"', "UTF-8"]),
    "controls in a value": (sets(model__path="./\x1b[2J"), ["./\\x1b[2J", "not a folder"]),
    "a path that is too long": (["--output-dir", "a" * 5000, *sets(model__path="synthetic")], ["aaaa...", "too long"]),
    "a model path that is too long": (sets(model__path="./" + "a" * 5000), ["aaaa...", "too long"]),
    "config file missing": (["--config", "none.toml"], ["none.toml", "no such file"]),
    "model not set": ([], ["model.path"]),
    "model folder missing": (sets(model__path="./nowhere"), ["./nowhere", "not a folder"]),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_config_cases(cli: Cli, tmp_path: Path, case: str) -> None:
    words, expected = CONFIG_CASES[case]
    assert_refused(cli("sft", *words), expected)
    assert list(tmp_path.iterdir()) == []


def assert_refused(outcome: Outcome, expected: list[str]) -> None:
    assert outcome.code == 2, outcome.error
    assert outcome.error.startswith("error: "), outcome.error
    assert "Traceback" not in outcome.error + outcome.output
    for text in expected:
        assert text in outcome.error, outcome.error


def test_config_file_with_a_syntax_error_names_the_line(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.toml", "seed = 0\n[model\n")
    assert_refused(cli("rl", "--config", path), ["bad.toml", "line 2"])


def test_every_mistake_is_reported_at_once(cli: Cli) -> None:
    outcome = cli("config", *sets(rl__lr="-1", sft__lr="-2", rl__foo="1"))
    assert_refused(outcome, ["rl.lr = -1", "sft.lr = -2", "rl.foo"])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with tokenizer, as an ordinary folder."""
    from carft_fast.data.synthetic import build_model_config, build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    transformers.LlamaForCausalLM(build_model_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_data(model: Path, train: str, held_out: str, **more: str) -> list[str]:
    values = {"data__max_length": "160", "rollout__max_new_tokens": "24", **more}
    return sets(model__path=str(model), data__train=train, data__eval=held_out, **values)


DATA_CASES: dict[str, tuple[object, list[str]]] = {
    "malformed JSON": ('[\n{"question": "a"},\n{"question" "b"}\n]', ["train.json", "line 3"]),
    "an object instead of a list": ({"rows": ROWS}, ["train.json"]),
    "empty file": ("", ["train.json"]),
    "empty list": ([], ["train.json"]),
    "no annotated reasoning": ([{**row, "answer_cot": ""} for row in ROWS], ["train.json"]),
    "no parsable answer": ([{**row, "answer_value": "many"} for row in ROWS], ["train.json", "many"]),
    "no question": ([{k: v for k, v in row.items() if k != "question"} for row in ROWS], ["train.json", "question"]),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_training_data_cases(cli: Cli, tmp_path: Path, model_folder: Path, case: str) -> None:
    content, expected = DATA_CASES[case]
    train = write(tmp_path / "train.json", content)
    held_out = write(tmp_path / "test.json", ROWS)
    outcome = cli("sft", *with_data(model_folder, train, held_out), "--output-dir", "out")
    assert_refused(outcome, expected)
    assert not (tmp_path / "out").exists()


def test_missing_data_file(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    held_out = write(tmp_path / "test.json", ROWS)
    assert_refused(cli("sft", *with_data(model_folder, "./none.json", held_out)), ["none.json"])


def test_data_not_set(cli: Cli, model_folder: Path) -> None:
    assert_refused(cli("sft", *sets(model__path=str(model_folder))), ["data.max_length"])
    assert_refused(cli("sft", *with_data(model_folder, "", "")), ["data.train is not set"])
    assert_refused(cli("eval", *with_data(model_folder, "", "")), ["data.eval is not set"])


def test_max_length_below_every_prompt(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    path = write(tmp_path / "rows.json", ROWS)
    words = with_data(model_folder, path, path, data__max_length="6", rollout__max_new_tokens="2")
    assert_refused(cli("sft", *words), ["max_length"])


def test_max_length_above_the_model(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    path = write(tmp_path / "rows.json", ROWS)
    wide = {"sft__micro_batch_tokens": "100000", "rl__micro_batch_tokens": "100000"}
    words = with_data(model_folder, path, path, data__max_length="100000", **wide)
    assert_refused(cli("sft", *words), ["data.max_length = 100000", "positions"])


def test_model_folder_without_tokenizer(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    assert_refused(cli("sft", *sets(model__path=str(bare))), [str(bare), "no tokenizer"])


def test_folder_that_is_no_model(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(cli("sft", *sets(model__path=str(tmp_path / "empty"))), ["config.json"])


def test_model_with_pickled_weights_only(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    import torch

    rows = write(tmp_path / "rows.json", ROWS)
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    assert_refused(cli("eval", *with_data(folder, "", rows)), [str(folder), "safetensors"])


def copy_of(model_folder: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_damaged_weights(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    rows = write(tmp_path / "rows.json", ROWS)
    folder = copy_of(model_folder, tmp_path / "short")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    outcome = cli("sft", *with_data(folder, rows, rows), "--output-dir", "out")
    assert_refused(outcome, [str(folder), "weights could not be loaded"])


def test_weights_of_other_names(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    """transformers would go on with random ones."""
    from safetensors.torch import load_file, save_file

    rows = write(tmp_path / "rows.json", ROWS)
    folder = copy_of(model_folder, tmp_path / "renamed")
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    outcome = cli("eval", *with_data(folder, rows, rows))
    assert_refused(outcome, [str(folder), "2 weights are missing", "model.layers.0.self_attn.q_proj.weight"])


def test_a_tokenizer_with_more_tokens_than_embeddings(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    folder = copy_of(model_folder, tmp_path / "grown")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["annotated"])
    tokenizer.save_pretrained(folder)
    rows = write(tmp_path / "rows.json", [{**row, "answer_cot": "annotated"} for row in ROWS])
    outcome = cli("sft", *with_data(folder, rows, rows), "--dry-run")
    assert_refused(outcome, [str(folder), f"token {len(tokenizer) - 1} (annotated)", f"{len(tokenizer) - 1} rows"])


def test_a_model_with_an_adapter(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    """transformers would load it frozen."""
    import peft

    folder = copy_of(model_folder, tmp_path / "adapted")
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lm.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    lm.save_pretrained(folder)
    rows = write(tmp_path / "rows.json", ROWS)
    outcome = cli("rl", *with_data(folder, rows, rows), "--output-dir", "out")
    assert_refused(outcome, [str(folder), "LoRA adapter", "merge_and_unload"])
    assert not (tmp_path / "out").exists()


def test_resume_with_changed_rows(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    rows = write(tmp_path / "rows.json", ROWS)
    words = with_data(model_folder, rows, rows, sft__max_steps="1", sft__batch_size="4", data__eval_rows="2")
    assert cli("sft", *words, "--output-dir", "out").code == 0
    (tmp_path / "out" / "summary.json").unlink()
    before = (tmp_path / "out" / "run.json").read_text()
    write(tmp_path / "rows.json", ROWS[:-1])
    outcome = cli("sft", *words, "--output-dir", "out", "--resume")
    assert_refused(outcome, ["data.train has changed", f"{len(ROWS)} usable rows then, {len(ROWS) - 1} now"])
    write(tmp_path / "rows.json", ROWS[::-1])
    assert_refused(cli("sft", *words, "--output-dir", "out", "--resume"), ["data.train has changed", "not the same"])
    assert (tmp_path / "out" / "run.json").read_text() == before
    write(tmp_path / "rows.json", ROWS)
    assert cli("sft", *words, "--output-dir", "out", "--resume").code == 0


def test_tokenizer_without_eos(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "no_eos"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    )
    tokenizer.save_pretrained(folder)
    path = write(tmp_path / "rows.json", ROWS)
    assert_refused(cli("sft", *with_data(folder, path, path)), ["EOS"])


def test_chat_template_missing(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    path = write(tmp_path / "rows.json", ROWS)
    assert_refused(cli("sft", *with_data(model_folder, path, path, data__template="chat")), ["chat template"])


def test_output_folder_is_a_file(cli: Cli, tmp_path: Path, tiny_run: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(cli("quickstart", *tiny_run, "--output-dir", "file"), ["--output-dir file", "not a folder"])
    assert_refused(cli("quickstart", *tiny_run, "--output-dir", "file/run"), ["file is a file"])
    assert (tmp_path / "file").read_text() == "mine"


def test_output_folder_cannot_be_written(cli: Cli, tiny_run: list[str]) -> None:
    assert_refused(cli("quickstart", *tiny_run, "--output-dir", "/proc/carft_fast_run"), ["--output-dir /proc"])


def test_output_folder_not_empty(cli: Cli, tmp_path: Path, tiny_run: list[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    assert_refused(cli("quickstart", *tiny_run, "--output-dir", "mine"), ["not empty", "--resume"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_resume_without_a_run(cli: Cli, tiny_run: list[str]) -> None:
    assert_refused(cli("quickstart", *tiny_run, "--output-dir", "nothing", "--resume"), ["--resume", "no run"])


def test_resume_with_a_changed_config(cli: Cli, tmp_path: Path, tiny_run: list[str]) -> None:
    from carft_fast.cli import QUICKSTART_CONFIG

    (tmp_path / "run").mkdir()
    saved = to_toml(load_config(str(QUICKSTART_CONFIG), tiny_run[1::2]))
    write(tmp_path / "run" / "config.toml", saved)
    outcome = cli("quickstart", *tiny_run, *sets(rl__lr="1e-3"), "--output-dir", "run", "--resume")
    assert_refused(outcome, ["config differs", "rl.lr: 0.0002 -> 0.001"])
    assert (tmp_path / "run" / "config.toml").read_text() == saved


def test_resume_by_another_command(cli: Cli, tmp_path: Path, tiny_run: list[str]) -> None:
    from carft_fast.cli import QUICKSTART_CONFIG

    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "config.toml", to_toml(load_config(str(QUICKSTART_CONFIG), tiny_run[1::2])))
    write(tmp_path / "run" / "run.json", {"stages": ["sft"]})
    write(tmp_path / "run" / "summary.json", {"method": "sft"})
    words = ["--config", str(QUICKSTART_CONFIG), *tiny_run, "--output-dir", "run", "--resume"]
    assert_refused(cli("rl", *words), ["['sft']", "['rl']"])


def test_heads_of_another_variant(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    from carft_fast.models.heads import CarftHeads

    folder = tmp_path / "with_heads"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    CarftHeads(64, 32, "shared").save(folder)
    path = write(tmp_path / "rows.json", ROWS)
    outcome = cli("rl", *with_data(folder, path, path), "--output-dir", "out")
    assert_refused(outcome, ["carft_heads.json", "embedding_dim 32", "asks for 64"])
    assert not (tmp_path / "out").exists()


def test_pad_equal_to_eos_is_no_mistake(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    """The completion's own EOS must stay in the loss when padding has the same id."""
    folder = tmp_path / "pad_is_eos"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    path = write(tmp_path / "rows.json", ROWS)
    words = with_data(folder, path, path, sft__max_steps="1", sft__batch_size="8")
    assert cli("sft", *words, "--output-dir", "out").code == 0
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[1])
    tokens = [len(tokenizer(f"add one\nTherefore, the answer is: {row['answer_value']}").input_ids) + 1 for row in ROWS]
    assert record["completion_tokens"] == sum(tokens)


def test_dry_run_writes_nothing(cli: Cli, tmp_path: Path, tiny_run: list[str]) -> None:
    outcome = cli("quickstart", *tiny_run, "--dry-run")
    assert outcome.code == 0, outcome.error
    assert "6 steps of 16 sequences" in outcome.output
    assert "4 steps of 12 sequences" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_one_sentence() -> None:
    """Without the trainer's dependencies the command says which pip line brings them."""
    code = "import sys; sys.modules['typer'] = None\nfrom carft_fast.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    hint = 'carft-fast needs typer, which is not installed: pip install ".[train]", in the checkout'
    assert result.stderr.strip() == hint


def test_ctrl_c_while_modules_load_is_no_traceback() -> None:
    """The interrupt comes where typer would be imported."""
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from carft_fast.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nonsense"}}'),
        ("tokenizer.json", "[1, 2]"),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}'),
        ("config.json", '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}'),
        ("config.json", '{"model_type": 5}'),
        ("config.json", "[]"),
    ],
)
def test_files_of_a_model_that_libraries_refuse(
    cli: Cli, tmp_path: Path, model_folder: Path, file: str, content: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / file).write_text(content)
    path = write(tmp_path / "rows.json", ROWS)
    outcome = cli("sft", *with_data(folder, path, path), "--dry-run")
    assert (outcome.code, len(outcome.error.strip().splitlines())) == (2, 1), outcome.error
    assert outcome.error.startswith("error: ")


def test_attention_that_cannot_train_on_a_cpu_is_refused_before_it_starts(cli: Cli, tiny_run: list[str]) -> None:
    outcome = cli("quickstart", *tiny_run, *sets(model__attention="flex_attention"), "--dry-run")
    assert_refused(outcome, ['model.attention = "flex_attention"', '"packed"'])


@pytest.mark.parametrize("content", ["[]", "[" * 10**5, '{"weight_map": 3}'])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "carft_heads.json"])
def test_garbage_in_a_models_files_is_refused_before_data_is_read(
    cli: Cli, tmp_path: Path, model_folder: Path, file: str, content: str
) -> None:
    folder = copy_of(model_folder, tmp_path / "model")
    if file != "config.json":
        (folder / "carft_heads.safetensors").touch()
    if "index" in file:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / file).write_text(content)
    outcome = cli("rl", *with_data(folder, "none.json", "none.json"), "--output-dir", "out")
    assert_refused(outcome, [str(folder)])
    assert len(outcome.error) < 1000
    assert not (tmp_path / "out").exists()


def test_an_error_nobody_expected_shows_its_controls(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's error that quotes data, in a traceback."""

    def fail(*_: object) -> None:
        raise RuntimeError("row \x1b[2J\x9b31m")

    monkeypatch.setattr("carft_fast.trainer.load_method_config", fail)
    outcome = cli("sft")
    assert outcome.code == 1
    assert "RuntimeError: row \\x1b[2J\\x9b31m" in outcome.error
    assert "\x1b" not in outcome.error


def test_checked_data_is_shown_and_not_obeyed(cli: Cli, tmp_path: Path) -> None:
    attack = "\x1b[2J\x9b31m\u202e"
    rows = [{**row, "question": f"{row['question']} {attack}"} for row in ROWS]
    path = write(tmp_path / "rows.json", [*rows, {**rows[0], "answer_value": attack}])
    for words in ([], ["--json"]):
        outcome = cli("data", "check", path, *words)
        assert outcome.code == 0, outcome.error
        assert not set(outcome.output) & set(attack[0] + "\x9b\u202e")
    assert json.loads(outcome.output)


def test_exit_code_of_the_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "carft_fast", "rl", "--set", "rl.lr=-1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        2,
        "error: rl.lr = -1: input should be greater than 0",
    )
