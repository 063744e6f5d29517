"""Entry point of `carft-fast` and `python -m carft_fast`: turns a missing extra into one sentence."""

import sys

from carft_fast import missing_extra


def main() -> None:
    try:
        from carft_fast.cli import run_cli

        run_cli()
    except KeyboardInterrupt:  # while modules load; later ones are the commands'
        sys.exit(130)
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
