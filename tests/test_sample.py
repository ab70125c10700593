"""`nitro-e sample` over many prompts: layouts, what is drawn once, several processes, kills, prompts files."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nitro_e.cli import sample
from nitro_e.config import ConfigError
from nitro_e.data.prompts import read_records
from nitro_e.files import short_hash
from nitro_e.sampling.folder import batched, draw_folder, read_manifest
from nitro_e.sampling.layouts import LAYOUTS, Drawing, write_metadata
from nitro_e.sampling.pipeline import Images, to_image
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.sampling.sheets import sheet

ROOT = Path(__file__).parent.parent
ABOUT = {"model": "toy", "sampling": {"steps": 2}}
RECORDS = [{"prompt": f"prompt {index}"} for index in range(7)]


class Pipeline:
    """Paints an image's seed and its prompt's number; dies after `lives` images."""

    def __init__(self, lives: int = 10**6) -> None:
        self.lives, self.drawn = lives, []

    def __call__(self, prompts, *, negative_prompt, seeds, batch_size, progress, **overrides):
        assert len(prompts) == len(negative_prompt) == len(seeds) <= batch_size
        if len(self.drawn) + len(prompts) > self.lives:
            raise KeyboardInterrupt
        self.drawn += seeds
        values = [[int(prompt.split()[-1]) / 64, seed % 64 / 64, 0.0] for prompt, seed in zip(prompts, seeds)]
        return Images([to_image(torch.tensor(value)[:, None, None].expand(3, 8, 8)) for value in values])


def draw(folder: Path, pipeline: Pipeline, drawings: list[Drawing], about=ABOUT, **options) -> int:
    return draw_folder(pipeline, drawings, folder, about, overrides={}, batch_size=4, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_files_of_the_layouts():
    records = [
        {"prompt": "A red Fox!", "id": "x1"},
        {"prompt": "two", "id": "x2", "seed": 100, "negative_prompt": "n"},
    ]
    drawn = {name: layout(records, 4, 7, "bad") for name, layout in LAYOUTS.items()}
    assert [item.file for item in drawn["flat"]][:5] == [
        "0000-a-red-fox-7.png",
        "0001-a-red-fox-8.png",
        "0002-a-red-fox-9.png",
        "0003-a-red-fox-10.png",
        "0004-two-100.png",
    ]
    assert [item.file for item in drawn["geneval"]][3:5] == [
        "00000/samples/00003.png",
        "00001/samples/00000.png",
    ]
    assert [item.file for item in drawn["dpg"]] == ["x1.png", "x2.png"]
    assert [item.file for item in drawn["parti"]][3:6] == ["00000_3.png", "00001.png", "00001_1.png"]
    for items in drawn.values():
        seeds = [seed for item in items for seed in item.seeds]
        assert seeds == [7, 8, 9, 10, 100, 101, 102, 103]
        assert {(item.prompt, item.negative_prompt) for item in items} == {
            ("A red Fox!", "bad"),
            ("two", "n"),
        }
    with pytest.raises(ConfigError, match="--num-images 3: --layout dpg makes square grids"):
        LAYOUTS["dpg"](records, 3, 0, "")


def test_a_grid_of_dpg_holds_its_images(tmp_path):
    draw(tmp_path, Pipeline(), LAYOUTS["dpg"](RECORDS[:2], 4, 10, ""))
    grid = np.asarray(Image.open(tmp_path / "1.png"))
    assert grid.shape == (16, 16, 3)
    found = [grid[row, column, 1] for row in (0, 8) for column in (0, 8)]
    assert found == [round((seed / 64 + 1) * 127.5) for seed in (14, 15, 16, 17)]


def test_an_interrupted_folder_is_continued_and_nothing_is_drawn_twice(tmp_path):
    drawings = LAYOUTS["flat"](RECORDS, 3, 0, "")
    draw(tmp_path / "whole", Pipeline(), drawings)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "cut", first := Pipeline(lives=10), drawings)
    assert len(read_manifest(tmp_path / "cut")) == len(first.drawn) == 8
    with (tmp_path / "cut" / "manifest.jsonl").open("ab") as file:
        file.write(b'{"file": "0008')  # as a kill leaves it
    assert draw(tmp_path / "cut", second := Pipeline(), drawings) == 13
    assert sorted(first.drawn + second.drawn) == list(range(21))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert draw(tmp_path / "cut", third := Pipeline(), drawings) == 0 and not third.drawn


def test_what_has_changed_is_drawn_anew(tmp_path):
    drawings = LAYOUTS["parti"](RECORDS, 1, 0, "")
    draw(tmp_path, Pipeline(), drawings)
    other = [*drawings[:6], drawings[6]._replace(prompt="prompt 60")]
    assert draw(tmp_path, pipeline := Pipeline(), other) == 1 and pipeline.drawn == [6]
    (tmp_path / drawings[2].file).unlink()
    assert draw(tmp_path, pipeline := Pipeline(), other) == 1 and pipeline.drawn == [2]
    assert draw(tmp_path, Pipeline(), other, {"model": "toy", "sampling": {"steps": 3}}) == 7
    assert len(list(tmp_path.glob("settings-*.json"))) == 2


def test_processes_that_start_at_different_times_share_the_work(tmp_path):
    drawings = LAYOUTS["geneval"](RECORDS, 3, 0, "")
    draw(tmp_path / "one", Pipeline(), drawings)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "two", late := Pipeline(lives=4), drawings, rank=1, world=2)
    draw(tmp_path / "two", early := Pipeline(), drawings, rank=0, world=2)
    assert (tmp_path / "two" / "manifest.rank0.jsonl").exists()
    draw(tmp_path / "two", again := Pipeline(), drawings, rank=1, world=2)
    assert sorted(late.drawn + early.drawn + again.drawn) == list(range(21))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_drawings_are_never_divided_and_names_come_once(tmp_path):
    drawings = LAYOUTS["dpg"](RECORDS, 4, 0, "")
    assert [len(batch) for batch in batched(drawings, 9)] == [2, 2, 2, 1]
    assert [len(batch) for batch in batched(drawings, 1)] == [1] * 7
    with pytest.raises(ConfigError, match="two prompts want the file '0.png'"):
        draw(tmp_path, Pipeline(), [drawings[0], drawings[0]])
    with pytest.raises(ConfigError, match="lies outside the folder"):
        draw(tmp_path, Pipeline(), [drawings[0]._replace(file="../0.png")])


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.txt", "one\n\n  two \n", [{"prompt": "one"}, {"prompt": "two"}]),
        ("a.jsonl", '{"prompt": "one", "seed": 3}\n', [{"prompt": "one", "seed": 3}]),
        ("a.tsv", "Prompt\tCategory\none\tArts\n", [{"prompt": "one", "category": "Arts"}]),
        ("a.tsv", "Text\tCategory\none\tArts\n", "has no column 'Prompt' (it has text, category)"),
        ("a.tsv", "Prompt\tCategory\none\n", "a.tsv:2 has 1 columns, the header has 2"),
        ("a.jsonl", '{"prompt": 1}\n', 'a.jsonl:1 has no "prompt"'),
        ("a.jsonl", '{"prompt": "x", "seed": -1}\n', "seed is -1; write a whole number"),
        ("a.jsonl", '{"prompt": "x", "negative_prompt": 1}\n', "negative_prompt is 1; write text"),
        ("a.txt", " \n", "is empty; give a prompt per line"),
    ],
)
def test_prompts_files(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    if isinstance(expected, list):
        assert read_records(tmp_path / name) == expected
    else:
        with pytest.raises(ConfigError) as error:
            read_records(tmp_path / name, "--prompts-file")
        assert expected in str(error.value) and str(error.value).startswith("--prompts-file: ")


def test_prompts_from_standard_input(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "one", "id": "a"}\n'))
    assert read_records("-") == [{"prompt": "one", "id": "a"}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert [record["prompt"] for record in read_records("-")] == ["one", "two"]


def test_several_processes_cannot_share_standard_input(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sample.main(["shapes", "--prompts-file", "-", "--out", str(tmp_path)]) == 2
    assert "standard input reaches one of 2 processes only; give a file" in capsys.readouterr().err


def test_metadata_follows_the_prompts(tmp_path):
    for records in (RECORDS, RECORDS[::-1]):
        write_metadata(LAYOUTS["geneval"](records, 2, 0, ""), tmp_path)
        found = [json.loads((tmp_path / f"{i:05d}/metadata.jsonl").read_text()) for i in range(len(records))]
        assert found == records


def test_a_sheet_enlarges_small_images_and_has_room_for_words():
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
    made = sheet(images, ["short", "word " * 100, "x" * 500], columns=2)
    assert made.width == 2 * 256 + 8 and made.height > 2 * 256 + 2 * 3 * 14
    assert made.getpixel((10, 10)) == (255, 0, 0) and made.getpixel((274, 10)) == (0, 0, 255)


def test_the_command_tells_its_settings_and_skips_what_is_there(tmp_path, capsys):
    arguments = [
        "shapes",
        "--prompt",
        "a red circle",
        "--steps",
        "1",
        "--num-images",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert sample.main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "shapes: 1 step of euler, guidance 3, 64x64 px, float32 on cpu" in said and "2 images drawn;" in said
    )
    assert Image.open(tmp_path / "grid.png").size[0] == 2 * 256 + 8
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["seeds"] for line in lines] == [[0], [1]]
    settings = json.loads((tmp_path / f"settings-{lines[0]['key']}.json").read_text())
    assert settings["sampling"]["steps"] == 1 and settings["model"] == "shapes"
    assert sample.main(arguments) == 0
    assert "0 images drawn, 2 were there" in capsys.readouterr().out


def test_another_adapter_is_another_setting(tmp_path):
    weights, *adapters = files = [tmp_path / name / "model.safetensors" for name in ("weights", "a", "b")]
    for path in files:
        path.parent.mkdir()
        path.write_bytes(b"1")
    pipeline = SimpleNamespace(path=weights, model=torch.nn.Linear(1, 1))

    def key(*more: str) -> str:
        options = sample.parse([str(weights.parent), *more])
        return short_hash(sample.settings_of(pipeline, options, SamplingConfig(resolution=64)))

    def keys() -> list[str]:
        return [key(), *(key("--lora", str(path.parent)) for path in adapters)]

    before = keys()
    assert len(set(before)) == 3 and keys() == before
    adapters[1].write_bytes(b"12")
    assert [one == other for one, other in zip(before, keys())] == [True, True, False]


@pytest.mark.slow
def test_killed_again_and_again_draws_nothing_twice(tmp_path):
    """The real command over 160 prompts in fresh interpreters, killed after every few batches."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a photo of {number} red circles\n" for number in range(160)))
    command = [
        sys.executable,
        "-m",
        "nitro_e.cli",
        "sample",
        "shapes",
        "--prompts-file",
        str(prompts),
        "--steps",
        "2",
    ]
    command += ["--batch-size", "8", "--layout", "parti"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], env=environment, check=True)
    out, seen = tmp_path / "killed", {}
    for _ in range(30):
        process = subprocess.Popen([*command, "--out", str(out)], env=environment)
        before = len(list(out.glob("*.png")))
        while process.poll() is None and len(list(out.glob("*.png"))) < before + 20:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = read_manifest(out)
        times = {name: (out / name).stat().st_mtime_ns for name in lines}
        assert all(times[name] == stamp for name, stamp in seen.items())  # what was listed is not drawn again
        seen = times
        if process.returncode == 0:
            break
    assert len(seen) == 160
    whole = contents(tmp_path / "whole")
    assert {name: content for name, content in contents(out).items() if name.endswith(".png")} == {
        name: content for name, content in whole.items() if name.endswith(".png")
    }
