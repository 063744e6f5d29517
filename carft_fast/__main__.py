"""Entry point of `carft-fast` and `python -m carft_fast`: turns a missing extra into one sentence."""

import os
import sys
from pathlib import Path

from carft_fast import missing_extra


def main() -> None:
    # What lies in the working folder, perhaps a model that was downloaded, is not imported: neither here, where
    # `python -m` would, nor in processes that libraries start. What the user has set stays.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if sys.path[0] in ("", os.getcwd()) and Path(__file__).parents[1] != Path.cwd():
        del sys.path[0]
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
