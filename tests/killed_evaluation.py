"""`nitro-e evaluate`, killed by SIGKILL at the Nth call of a function; test_benchmarks starts it.

    python tests/killed_evaluation.py save_png|append_lines|save_tensors N ARGUMENT ...

A file that the call would write is cut short first, where the function writes in place. With N 0 nothing is killed.
"""

from __future__ import annotations

import os
import signal
import sys

from nitro_e import files
from nitro_e.cli import evaluate as tool
from nitro_e.evaluation import distances, images


def main(point: str, number: int, arguments: list[str]) -> int:
    distances.CHUNK = 2
    module = images if hasattr(images, point) else files
    original, calls = getattr(files, point), []

    def write(*given, **options):
        calls.append(given)
        if len(calls) != number:
            return original(*given, **options)
        if point == "append_lines":
            path, lines = given
            original(path, lines)
            os.truncate(path, path.stat().st_size - 20)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, point, write)
    return tool.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
