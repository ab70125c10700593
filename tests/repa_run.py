"""The REPA recipe of the offline domain on a few images, through the real `train.py`: what the tests kill and compare."""

import subprocess
import sys
from pathlib import Path

from test_train import ROOT
from tiny import OPTIMIZER

from nitro_e.cli import data as data_tool
from nitro_e.cli import make_shapes

RECIPE = ROOT / "configs" / "shapes" / "1_pretrain.yaml"
SMALL = (
    "batch=4",
    "engine.save_every=2",
    "engine.log_every=1",
    "engine.sample_every=0",
    "engine.tracker=none",
    "evaluation=null",
    "stage.optim.warmup=2",
)


def make_data(folder: Path, num: int = 64) -> None:
    """Images, latents, text embeddings and vision features in `folder/data/shapes`, where the recipe looks for them."""
    out = folder / "data" / "shapes"
    components = ["--codec", "shapes-dc-ae", "--text", "shapes-llama", "--vision", "shapes-vit"]
    assert make_shapes.main([str(out), "--split", "train", "--num", str(num)]) == 0
    encode = [
        "encode",
        f"{out}/shapes-train-*.tar",
        "--out",
        str(out),
        "--resolution",
        "64",
        "--workers",
        "0",
    ]
    assert data_tool.main([*encode, *components]) == 0


def start(folder: Path, run: str, *overrides: str, log: Path | None = None) -> subprocess.Popen:
    """A fresh interpreter that trains in `folder/run`."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        str(RECIPE),
        f"run={run}",
        *SMALL,
        *OPTIMIZER,
        *overrides,
    ]
    with open(log or "/dev/null", "ab") as file:
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
