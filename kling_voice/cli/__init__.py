"""The command line, `kling-voice`: from recordings to voices without a program.

This file only starts it, and tells what is missing if it cannot; the commands are in `app.py`.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words behind the command's name; by default those of this process.

    Returns:
        The exit status: 0 all done, 1 something failed, 2 usage, configuration or a bad manifest,
        130 interrupted.
    """
    try:
        from kling_voice.cli.app import run

        return run(sys.argv[1:] if arguments is None else arguments)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("cyclopts", "filelock", "rich", "tinytag"):
            raise
        sys.stderr.write(
            f"Error: the command line needs {missing}: pip install 'kling-voice[cli]'\n"
        )
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
