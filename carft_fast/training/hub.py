"""An exported model to the Hugging Face Hub, with a card that says how it was made."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id

from carft_fast.config import SYNTHETIC, Config, iter_fields, method_name
from carft_fast.core import InputError, TrainingError, first_line, redact
from carft_fast.reports import markdown_table, read_records

CARD = "README.md"
_PRIVATE = re.compile(
    r"model\.path|data\.(train|eval|mix|few_shot|template)|rollout\.(servers|server_devices|transfer_dir)|"
    r"(output|distributed)\..*"
)
"""Settings that say something of the machine."""
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


def check_push(repo: str) -> None:
    """Raises InputError where nothing could be pushed to `repo`: no Hub id, no token, or one that the Hub refuses."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f'--push "{repo}": {first_line(error)}') from None
    if repo.count("/") != 1:
        raise InputError(f'--push "{repo}": expected owner/name')
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError(f'--push "{repo}": HF_HUB_OFFLINE is set, so the Hub is not asked: unset it')
    if huggingface_hub.get_token() is None:
        raise InputError(f'--push "{repo}": no token for the Hub: set HF_TOKEN, or call "hf auth login"')
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # of its HTTP library as well
        raise InputError(
            f'--push "{repo}": {huggingface_hub.constants.ENDPOINT} does not take the token, or cannot be reached: '
            f"{redact(first_line(error))}"
        ) from None


def push(folder: Path, repo: str, *, public: bool) -> None:
    """Upload a folder's files as one commit, into a repository that is made where there is none.

    Raises TrainingError with what to do then: the folder stays.
    """
    disable_progress_bars()
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        made_by = f"Model of carft-fast {version('carft-fast')}"
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=made_by)
    except Exception as error:
        raise TrainingError(
            f"{folder} is whole, but was not pushed to {repo}: {redact(first_line(error))}. To try again: "
            f"hf upload {repo} {folder}"
        ) from error


def model_card(config: Config, stage: str, step: int, run_folder: Path, repo: str) -> str:
    """In Markdown, with the Hub's metadata. Of folders and files on this machine it has the last part of the name.

    Figures are those that the run in `run_folder` recorded at this step; its records may be gone.
    """
    method = method_name(config) if stage == "rl" else "sft"
    data = [name for name in config.data.mix or [config.data.train] if is_hub_id(name)]
    metadata = ModelCardData(
        base_model=config.model.path if is_hub_id(config.model.path) else None,
        datasets=data or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["carft-fast", method],
    )
    rows = [
        ("base model", _shown(config.model.path)),
        ("method", f"{method}, {stage.upper()} step {step}, seed {config.seed}"),
        ("training data", ", ".join(map(_shown, config.data.mix or [config.data.train]))),
        ("held-out data", _shown(config.data.eval)),
        ("made by", f"carft-fast {version('carft-fast')}"),
    ]
    chosen = [
        (key, repr(value))
        for key, field, value in iter_fields(config)
        if value != field.get_default(call_default_factory=True) and not _PRIVATE.fullmatch(key)
    ]
    return f"""---
{metadata.to_yaml()}
---

# {repo.rpartition("/")[2]}

{markdown_table(("", ""), rows)}

Prompt: {_prompt(config.data.template)}. The model writes its reasoning, then the answer. An ordinary folder for
transformers and vLLM; `carft_heads.safetensors` has the heads that training used.

## Figures

{_figures(run_folder, stage, step)}

## Settings other than the defaults

{markdown_table(("setting", "value"), chosen)}
"""


def _prompt(template: str) -> str:
    """A template's text stays out: it may be a file of this machine, and the tokenizer does not hold it."""
    if template == "carft":
        return "`Question:\\n{question}\\nAnswer reasoning:\\n`"
    return "the chat template" if template == "chat" else "a Jinja template of the run's own"


def _figures(run_folder: Path, stage: str, step: int) -> str:
    file = run_folder / "metrics.jsonl"
    records = read_records(file) if file.is_file() else []
    found = [r for r in records if (r["stage"], r["kind"], r["step"]) == (stage, "eval", step)]
    if not found:
        return "This checkpoint was not evaluated."
    record: dict[str, Any] = found[-1]
    low, high = record["accuracy_ci95"]
    rows = [("greedy accuracy", f"{record['accuracy']:.1%} ({low:.1%} to {high:.1%}, {record['rows']} rows)")]
    rows.append(("tokens per answer", f"{record['completion_length']:.1f}"))
    if "eval_loss" in record:
        rows.append(("validation loss", f"{record['eval_loss']:.4f} nats per token"))
    return markdown_table(("on the held-out rows", "value (95% interval, Wilson)"), rows)


def is_hub_id(name: str) -> bool:
    """Whether a setting names something on the Hub, and no file or folder of this machine."""
    path = Path(name)
    local = path.exists() or path.suffix in _FILES or name.startswith((".", "/", "~"))
    return name.count("/") == 1 and not local


def _shown(name: str) -> str:
    if not name:
        return "rows given in Python"
    if name == SYNTHETIC:
        return "synthetic, the quickstart's"
    return name if is_hub_id(name) else f"{Path(name).name} (local)"
