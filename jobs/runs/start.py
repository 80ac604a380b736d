"""The start of `python jobs/NAME.py`: the command line is read first, and what takes seconds is imported afterwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def start(file: str, description: str | None) -> NoReturn:
    """Run the job in `file`, in any environment that has its libraries: the repository's packages are put on the path
    of this process and of those that it starts."""
    path = Path(file).resolve()
    root = path.parents[1]
    sys.path[0:1] = [str(root), str(root / "platform")]  # in the place of jobs/, whose files are no libraries
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(root / "platform"), str(root), *filter(None, given)]))
    from diagonal.errors import FieldError
    from jobs.runs.arguments import options_of

    try:
        options_of(path.stem)(sys.argv[1:], description or "")
    except FieldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from jobs.runs.run import main

    main(f"jobs.{path.stem}")
    sys.exit()  # the file's own imports were for the module that `main` ran
