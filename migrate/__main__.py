"""`migrate` and `python -m migrate` (layer 5): errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from migrate.cli import cli
from migrate.cli.common import fail_with

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command line; the process ends with the documented code. Never shows a trace, unless
    MIGRATE_DEBUG=1 asks for those of unexpected errors.
    """
    # Nothing here multiplies matrices of floats: threads of a BLAS would only take memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        result = cli.main(arguments, prog_name="migrate", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`migrate ps | head`); nothing left to tell anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        code = fail_with(error)
    else:
        code = result if isinstance(result, int) else 0
    sys.exit(code)


if __name__ == "__main__":
    main()
