"""How commands end, and which numbers, words and devices their arguments take."""

import argparse
import errno
import importlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import nitro_e
from nitro_e.cli import COMMANDS
from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, TrainingError

ROOT = Path(__file__).parent.parent


def fails(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (lambda: None, 0, ""),
        (lambda: fails(ConfigError("x is wrong")), 2, "error: x is wrong\n"),
        (lambda: fails(TrainingError("too many")), 3, "training stopped: too many\n"),
        (lambda: open("/nope/x"), 2, "error: /nope/x: No such file or directory; mend that and"),
        (
            lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"),
            2,
            "error: [Errno 28] No space left on device; mend",
        ),
        (lambda: torch.empty(10**15), 2, "error: out of memory ("),
        (lambda: bytearray(10**15), 2, "error: out of memory (MemoryError); ask for less"),
        (lambda: fails(KeyboardInterrupt()), 130, "interrupted; run the same command again to continue\n"),
    ],
)
def test_every_end_has_a_code_and_at_most_one_line(capsys, command, code, words):
    assert cli.run(command) == code
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == (code != 0)


def test_a_terminal_without_the_letters_is_no_reason_to_end():
    command = [
        sys.executable,
        "-c",
        "from nitro_e.cli import common as cli; cli.run(lambda: print('caf\\xe9 \\udcff'))",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("caf\\xe9 \\udcff\n", "")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), KeyError("x"), RecursionError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")],
)
def test_a_bug_shows_its_traceback(error):
    with pytest.raises(type(error)):
        cli.run(lambda: fails(error))


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (cli.whole(), "0", 0),
        (cli.whole(), "25e6", 25_000_000),
        (cli.whole(1, 3), "3", 3),
        (cli.whole(1, 3), "4", "must be at most 3, got 4"),
        (cli.whole(1, 3), "0", "must be at least 1, got 0"),
        (cli.whole(), "1.5", "expected a whole number, got '1.5'"),
        (cli.whole(), "nan", "expected a whole number, got 'nan'"),
        (cli.whole(), "1e400", "expected a whole number, got '1e400'"),
        (cli.whole(), "x", "expected a number, got 'x'"),
        (cli.seed, "1e30", "must be at most"),
        (cli.real(0), "0.5", 0.5),
        (cli.real(0), "nan", "must be at least 0, got nan"),
        (cli.real(0), "-1", "must be at least 0, got -1"),
        (cli.real(0), "inf", "must be at most"),
        (cli.text, "\u05e2 \U0001f680", "\u05e2 \U0001f680"),
        (cli.text, "a \udcff", "is no character; write it as UTF-8"),
        (cli.device, "cpu", "cpu"),
        (cli.device, "foo", "'foo' is no device; use cpu, cuda, cuda:1 or mps"),
        (cli.device, "meta", "'meta' is no device"),
        (cli.device, "cuda:99", "'cuda:99' is not there; this machine has cpu (1)"),
    ],
)
def test_arguments(parse, text, value):
    try:
        assert parse(text) == value
    except argparse.ArgumentTypeError as error:
        assert str(value) in str(error)


def on_a_small_disk(arguments: list[str], limit: int) -> subprocess.CompletedProcess:
    """In a fresh interpreter, in which no file grows beyond `limit` bytes."""

    def restrict() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, preexec_fn=restrict, capture_output=True, text=True, env=environment, cwd=ROOT
    )


def check_full_disk(folder: Path, arguments: list[str], limit: int) -> None:
    ended = on_a_small_disk(arguments, limit)
    said = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert ended.returncode == 2 and len(said) == 1 and os.strerror(errno.EFBIG) in said[0], ended.stderr
    assert "Traceback" not in ended.stderr
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix == ".tmp"], left
    for path in left:
        if path.suffix == ".png":
            Image.open(path).load()


@pytest.mark.parametrize("limit", [100, 20_000])
def test_full_disk_while_shapes_are_made(tmp_path, limit):
    check_full_disk(tmp_path, ["tools/make_shapes.py", str(tmp_path / "out"), "--num", "200"], limit)


def test_full_disk_while_images_are_drawn(tmp_path):
    prompts = ["--prompt", "a red circle", "--steps", "1", "--out", str(tmp_path / "out")]
    check_full_disk(tmp_path, ["sample.py", "shapes", *prompts], 3000)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 1000, 3000, 20_000])
@pytest.mark.parametrize("command", ["evaluate", "synthesize", "encode", "pack"])
def test_full_disk_while_tools_write(tmp_path, command, limit):
    out = ["--out", str(tmp_path / "out")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{number} red circles\n" for number in range(40)))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        Image.effect_noise((64, 64), 50).save(images / f"fox_{number}.png")
    data = ["tools/data.py", "pack", "folder", str(images), "--captions-from-names"]
    if command == "encode":
        subprocess.run([sys.executable, *data, "--out", str(tmp_path / "packed")], check=True, cwd=ROOT)
    commands = {
        "evaluate": ["tools/evaluate.py", "shapes", "shapes", "--num", "6", "--steps", "1", *out],
        "synthesize": ["tools/synthesize.py", "shapes", "--prompts", str(prompts), "--steps", "1", *out],
        "encode": [
            "tools/data.py",
            "encode",
            f"{tmp_path}/packed/images-*.tar",
            "--codec",
            "dct-f8c24",
            "--resolution",
            "64",
            "--workers",
            "0",
            *out,
        ],
        "pack": [*data, *out],
    }
    check_full_disk(tmp_path / "out", commands[command], limit)


# ---- the installed command


def test_every_command_has_a_module_and_a_front_in_the_checkout():
    for name in COMMANDS:
        module = importlib.import_module(f"nitro_e.cli.{name.replace('-', '_')}")
        assert callable(module.main)
        front = (
            ROOT / f"{name}.py"
            if name in ("train", "sample")
            else ROOT / "tools" / f"{name.replace('-', '_')}.py"
        )
        assert f'run_front("{name}")' in front.read_text()


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 0, "usage: nitro-e COMMAND"),
        (["--version"], 0, nitro_e.__version__),
        (["smaple"], 2, "did you mean 'sample'"),
        (["describe"], 2, "usage: nitro-e describe"),
    ],
)
def test_the_command_names_what_there_is(arguments, code, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nitro-e", *arguments])
    with pytest.raises(SystemExit) as ended:
        nitro_e.cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == code and said in printed.out + printed.err


@pytest.mark.slow
def test_an_installed_copy_works_elsewhere(tmp_path):
    """Built and installed by pip into a folder of its own, run from another directory with its own package data."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "nitro_e", source / "nitro_e")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    install = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(source),
    ]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    variables = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, str(target / "bin" / "nitro-e")]
    drawn = [
        *command,
        "sample",
        "shapes",
        "--prompt",
        "a photo of a red circle",
        "--steps",
        "2",
        "--out",
        "out",
    ]
    subprocess.run(drawn, cwd=tmp_path, env=variables, check=True)
    assert (tmp_path / "out" / "grid.png").is_file()
    where = [sys.executable, "-c", "import nitro_e; print(nitro_e.__file__)"]
    shown = subprocess.run(where, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True)
    assert shown.stdout.startswith(str(target))


@pytest.mark.parametrize(
    "variable, command",
    [
        ("RANK", ["train", "configs/nitro_e_512/1_pretrain.yaml"]),
        ("WORLD_SIZE", ["train", "configs/nitro_e_512/1_pretrain.yaml", "--dry-run"]),
        ("RANK", ["sample", "shapes", "--prompt", "x", "--out", "OUT"]),
        ("RANK", ["data", "encode", "x.tar", "--out", "OUT"]),
        ("WORLD_SIZE", ["synthesize", "shapes", "--prompts", "x.txt", "--out", "OUT"]),
    ],
)
def test_a_launcher_s_variable_that_is_no_number_is_one_line(
    variable, command, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv(variable, "x")
    name, *arguments = [part.replace("OUT", str(tmp_path / "out")) for part in command]
    try:
        code = importlib.import_module(f"nitro_e.cli.{name}").main(arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and "'x'" in said.splitlines()[-1]


def test_a_line_for_stderr_is_one_write(monkeypatch):
    """Where Python is unbuffered, as in many containers, print() makes two, and lines of processes mix."""
    written = []
    monkeypatch.setattr(
        sys, "stderr", type("Stderr", (io.StringIO,), {"write": lambda self, text: written.append(text)})()
    )
    assert cli.run(lambda: (_ for _ in ()).throw(ConfigError("wrong"))) == 2
    assert written == ["error: wrong\n"]
