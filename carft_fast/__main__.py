"""Entry point of `carft-fast` and `python -m carft_fast`: turns a missing extra into one sentence."""

import sys

TRAIN_EXTRA = (
    "accelerate",
    "typer",
    "rich",
    "pydantic",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "lazy_loader",
    "matplotlib",
    "math_verify",
    "tensorboard",
)


def main() -> None:
    try:
        from carft_fast.cli import run_cli

        run_cli()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in TRAIN_EXTRA:
            raise
        print(
            f'carft-fast needs {missing}, which is not installed: pip install "carft-fast[train]"',
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
