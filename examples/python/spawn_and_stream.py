"""Start a runner, stream a completion from the model, and free the memory."""

import sys

from runner_client import InsufficientMemoryError, Options, RunnerError, RunnerProcess


def main(model: str) -> int:
    """Complete a prompt with a model; return an exit code."""
    options = Options(temperature=0, num_predict=64)
    try:
        # Check that the model fits, spawn the server and wait for the load. The process is
        # always gone at the end of the block.
        with RunnerProcess(model) as runner:
            for chunk in runner.completion("def fibonacci(n):", options=options):
                print(chunk.content, end="", flush=True)
    except InsufficientMemoryError as error:
        print(f"{error.required_bytes} bytes needed, {error.available_bytes} free", file=sys.stderr)
        return 1
    except RunnerError as error:
        # The class names the failure, including those found by the client without a runner.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
