"""Starts a runner, streams a completion from it, and gets its memory back."""

import sys

from runner_client import InsufficientMemoryError, Options, RunnerError, RunnerProcess


def main(model: str) -> int:
    """Completes a prompt with a model; returns an exit code."""
    options = Options(temperature=0, num_predict=64)
    try:
        # Decides whether the model fits, spawns the server, waits for the load; at the
        # end of the block the process is gone, whatever happened.
        with RunnerProcess(model) as runner:
            for chunk in runner.completion("def fibonacci(n):", options=options):
                print(chunk.content, end="", flush=True)
    except InsufficientMemoryError as error:
        print(f"{error.required_bytes} bytes needed, {error.available_bytes} free", file=sys.stderr)
        return 1
    except RunnerError as error:
        # Its class says what it is, also where the client itself found it and no runner was asked.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
