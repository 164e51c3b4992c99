"""The console command, and `python -m slimlm`. Imports little, so that Ctrl-C is heeded from the first moment on."""

import gc
import os
import signal
import sys


def leave() -> None:
    """Run the command to its end. While its modules are imported, which takes half a second, Ctrl-C ends the process
    at once: an exception might be lost in an import, or be told as another.

    What a signal ended later waits for no threads: its exception may have come while a lock was held that they want,
    and Python would wait for them for ever.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    from slimlm.cli import main

    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code >= 128:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise
    finally:
        gc.freeze()  # Python would look for cycles among all objects of all modules on its way out


if __name__ == "__main__":
    leave()
