"""Run many command lines of one program, each in a fork of this process, which has imported it and its libraries.

python fuzz_server.py PROGRAM.py SCRATCH < lines of JSON lists of arguments > lines of [code, seconds, stderr]

A line that takes longer than LIMIT seconds is killed; its code is null.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

LIMIT = 90


def child(main, arguments: list[str], output: Path) -> None:
    os.setsid()  # with its data workers in one group
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(sink, 2)
    code = 1  # as Python's own for an exception that nothing catches
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code or 0)


def wait(process: int) -> int | None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def serve(program: Path, scratch: Path) -> None:
    home = "tools" if program.stem == "train_components" else "nitro_e.cli"
    main = importlib.import_module(f"{home}.{program.stem}").main
    sys.argv = [str(program)]
    output = scratch / f"{program.stem}.stderr"
    for line in sys.stdin:
        started, process = time.monotonic(), os.fork()
        if process == 0:
            child(main, json.loads(line), output)
        code = wait(process)
        print(
            json.dumps([code, round(time.monotonic() - started, 1), output.read_text(errors="replace")]),
            flush=True,
        )


if __name__ == "__main__":
    import torch

    import nitro_e.evaluation.evaluate
    import nitro_e.stages.recipe  # noqa: F401
    from nitro_e.sampling.pipeline import TextToImage

    torch.set_num_threads(1)
    TextToImage.from_pretrained("shapes")  # what commands import only when they need it
    serve(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
