"""tools/data.py from the command line: the whole way from images to latents, and how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import flip_byte, image_samples, latent_samples
from tiny import OPTIMIZER

from nitro_e.cli import data as tool
from nitro_e.cli.benchmark import data as benchmark_data
from nitro_e.data.making import write_shards

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    write_shards(image_samples(30), str(tmp_path / "in/a-%03d.tar"), 12)
    return tmp_path / "in"


def test_pack_encode_verify_and_look(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert (
        tool.main(
            [
                "pack",
                "webdataset",
                f"{source}/*.tar",
                "--out",
                str(out),
                "--name",
                "e",
                "--samples-per-shard",
                "6",
                "--min-side",
                "1",
            ]
        )
        == 0
    )
    encode = [
        "encode",
        f"{out}/images-*.tar",
        "--out",
        str(out),
        "--codec",
        "dct-f8c24",
        "--text",
        "hash",
        "--resolution",
        "16",
        "--workers",
        "0",
    ]
    assert tool.main(encode) == 0
    capsys.readouterr()
    assert tool.main(["verify", f"{out}/*.tar", "--deep", "--report", str(tmp_path / "r.jsonl")]) == 0
    assert "15 shards, 90 samples" in capsys.readouterr().out and (tmp_path / "r.jsonl").read_text() == ""
    assert tool.main(["index", f"{out}/*.tar", "--force"]) == 0
    assert "90 samples in 15 shards" in capsys.readouterr().out
    assert tool.main(["stats", f"{out}/latents-*.tar"]) == 0
    assert json.loads(capsys.readouterr().out)["members"]["npy"]["count"] == 30
    assert tool.main(["head", f"{out}/images-*.tar", "-n", "3", "--sheet", str(tmp_path / "s.png")]) == 0
    assert (
        json.loads(capsys.readouterr().out.splitlines()[0])["caption"] == "caption 0"
        and (tmp_path / "s.png").is_file()
    )
    flip_byte(out / "latents-00001-000.tar", "e_00001_000003", "npy")
    assert tool.main(["verify", f"{out}/*.tar", "--report", str(tmp_path / "r.jsonl")]) == 1
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert ("latents-00001-000.tar", "e_00001_000003") in {(line["shard"], line["key"]) for line in lines}


def test_which_names_the_samples_of_a_step(tmp_path, capsys):
    write_shards(latent_samples(30), str(tmp_path / "a-%d.tar"), 10)
    from nitro_e.config import load
    from nitro_e.data import open_data
    from nitro_e.stages.recipe import RunConfig

    recipe, overrides = (
        ROOT / "configs/own_images/pretrain.yaml",
        [f"data.shards=[{tmp_path}/*.tar]", "batch=4", *OPTIMIZER],
    )
    assert tool.main(["which", str(recipe), *overrides, "--step", "3"]) == 0
    run = load(RunConfig, recipe, overrides)
    data = open_data(run.data, need_pixels=False, seed=run.seed, stage=run.name)
    assert capsys.readouterr().out.split() == data.keys(range(12, 16))


def test_which_reads_stored_features_as_training_does(tmp_path, capsys):
    """With a vision encoder in the recipe it looked for images, although the features are stored."""
    from nitro_e.cli.make_shapes import make_shards
    from nitro_e.config import load
    from nitro_e.stages.assembly import open_run_data
    from nitro_e.stages.recipe import RunConfig

    make_shards(tmp_path, "train", 12)
    encode = ["encode", f"{tmp_path}/shapes-train-*.tar", "--out", str(tmp_path), "--resolution", "64"]
    encode += ["--workers", "0"]
    encoders = ["--codec", "shapes-dc-ae", "--text", "shapes-llama", "--vision", "shapes-vit"]
    assert tool.main([*encode, *encoders]) == 0
    capsys.readouterr()
    columns = ", ".join(f"{tmp_path}/{name}-*.tar" for name in ("latents", "text", "features"))
    recipe = ROOT / "configs/shapes/1_pretrain.yaml"
    overrides = [f"data.shards=[{columns}]", "batch=4", *OPTIMIZER]
    assert tool.main(["which", str(recipe), *overrides, "--step", "3"]) == 0
    data = open_run_data(load(RunConfig, recipe, overrides))
    records = data.records()
    assert capsys.readouterr().out.split() == next(records).keys[12:16]
    records.close()


@pytest.mark.parametrize(
    "command, message",
    [
        ("pack webdataset IN/none-*.tar --out OUT", "missing shards: IN/none-"),
        ("pack sa1b IN/a-000.tar --out OUT", "needs --captions"),
        ("pack folder IN/nowhere --out OUT", "is not a folder"),
        ("pack folder IN --out OUT", "nothing to pack"),
        ("pack folder IN OUT --out OUT", "takes one input"),
        ("pack webdataset IN/*.tar --out OUT --name a-b", "--name 'a-b'"),
        ("encode IN/*.tar --out OUT", "nothing to encode"),
        ("encode IN/*.tar --out OUT --codec nothing", "unknown 'nothing'"),
        ("encode IN/*.tar --out OUT --codec dct-f8c24 --rank 3 --world 2", "--rank 3"),
        (
            "encode IN/*.tar --out OUT --codec dct-f8c24 --resolution 12 --workers 0",
            "not a multiple of the codec's stride 8",
        ),
        (
            "encode IN/*.tar --out OUT --codec dct-f8c24 --batch-size 0",
            "--batch-size must be at least 1, got 0",
        ),
        ("verify IN/none.tar", "missing shards"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(tmp_path, source, capsys, command, message):
    args = command.replace("IN", str(source)).replace("OUT", str(tmp_path / "out")).split()
    assert tool.main(args) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message.replace("IN", str(source)) in line


def test_a_reader_that_has_read_enough_is_no_error(source, monkeypatch):
    """As `nitro-e data head ... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert tool.main(["head", f"{source}/a-*.tar"]) == 0


def test_torchrun_variables_divide_the_work(tmp_path, source):
    """As torchrun and accelerate set them, without their processes talking to each other."""
    command = [
        sys.executable,
        str(ROOT / "tools/data.py"),
        "encode",
        f"{source}/a-*.tar",
        "--out",
        str(tmp_path / "out"),
        "--codec",
        "dct-f8c24",
        "--resolution",
        "16",
        "--workers",
        "0",
    ]
    for rank in range(2):
        variables = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=variables, check=True, capture_output=True)
        assert len(list((tmp_path / "out").glob("*.tar"))) == (2 if rank == 0 else 3)
    assert (tmp_path / "out/manifest-latents.jsonl").is_file()


def test_benchmark_reports_every_figure():
    found = benchmark_data.measure(shards=1, repeats=1)
    assert set(benchmark_data.TARGETS) < set(found) and all(value > 0 for value in found.values())
    text = benchmark_data.report({"index scan, headers only": 90_000.0, "indexed, in process": 5.0})
    assert "target >= 80,000  met" in text and "target >= 200,000  MISSED" in text
