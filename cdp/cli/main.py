"""The program `cdp`: its exit statuses, and its one line for every error.

Exit status: 0 done, 1 not done (one line on stderr says what to do), 2 wrong usage, 130 interrupted
by the keyboard.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from journal.errors import CdpError

USAGE = 2
INTERRUPTED = 130


def main() -> None:
    """The entry point."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status.

    :param arguments: without the program's name; None: those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = _quick(arguments)
        if status is None:
            status = _typer(arguments)
        sys.stdout.flush()
        return status
    except CdpError as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads our output has enough of it; Python must not fail at exit because of that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1


def _quick(arguments: Sequence[str]) -> int | None:
    """`cdp [--state-dir DIR] status [NAME] [--json]`, in the plainest spelling; None: not that.

    Monitoring calls it every few seconds, and typer, which converts arguments with pydantic, takes
    longer to import than all the rest takes to run. Whatever is not understood here is typer's.
    """
    words = list(arguments)
    state_dir = os.environ.get("CDP_STATE_DIR")
    if "_CDP_COMPLETE" in os.environ or "status" not in words:
        return None
    if words[0] == "--state-dir" and len(words) > 2:
        state_dir = words[1]
        del words[:2]
    elif words[0].startswith("--state-dir="):
        state_dir = words.pop(0).partition("=")[2]
    as_json = "--json" in words
    names = [word for word in words[1:] if word != "--json"]
    plain = all(name and not name.startswith("-") for name in names)
    if not words or words[0] != "status" or not plain or len(names) > 1:
        return None
    from cdp.cli.api_client import ApiClient, default_state_dir
    from cdp.cli.status import show_status

    client = ApiClient(Path(state_dir) if state_dir else default_state_dir())
    show_status(client, names[0] if names else None, as_json=as_json)
    return 0


def _typer(arguments: Sequence[str]) -> int:
    # pydantic would otherwise search all installed packages for plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    import typer

    from cdp.cli.app import ClickException, UsageError, build, command_of

    # While a shell completes a line, the arguments are not ours.
    app = build(None if "_CDP_COMPLETE" in os.environ else command_of(arguments))
    try:
        status = app(args=arguments, prog_name="cdp", standalone_mode=False)
    except UsageError as error:
        return _usage(error)
    except ClickException as error:
        _complain(str(error))
        return 1
    except typer.Abort:
        raise KeyboardInterrupt from None
    if status == INTERRUPTED:  # some versions of typer make this of it
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def _usage(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    message = getattr(error, "format_message", error.__str__)()
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(message.rstrip() + "\n")
        return USAGE
    command = context.command_path if context is not None else "cdp"
    _complain(f"{message.rstrip('.')}; see '{command} --help'")
    return USAGE


def _complain(message: str) -> None:
    try:
        sys.stdout.flush()
    except OSError:
        pass  # the reader went away; what is left to say goes to stderr
    sys.stderr.write(f"cdp: {' '.join(message.split())}\n")


if __name__ == "__main__":
    main()
