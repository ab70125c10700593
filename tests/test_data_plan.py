"""`nitro-e data plan`: bytes against shards that are really written, FLOPs against the formulas of the networks."""

import numpy as np
import pytest
import torch
from tiny import OPTIMIZER

from nitro_e.cli.data import main
from nitro_e.data.making import plan
from nitro_e.data.making.encode import EncodeConfig, text_members
from nitro_e.data.making.writer import write_shard
from nitro_e.encoders.random_weights import encode_flops


def written(tmp_path, samples):
    """Bytes of a sample in a real tar: the growth from one sample to many."""
    sizes = []
    for count in (
        20,
        60,
    ):  # a tar ends on a multiple of 10,240 bytes, so differences of 40 samples are exact to 256
        path = tmp_path / f"{count}.tar"
        write_shard(path, ({"__key__": f"k{n}", **samples} for n in range(count)))
        sizes.append(path.stat().st_size)
    return (sizes[1] - sizes[0]) / 40


@pytest.mark.parametrize("text_format", ["padded", "ragged"])
@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_bytes_are_those_of_written_shards(tmp_path, text_format, text_dtype):
    config = EncodeConfig(text_format=text_format, text_dtype=text_dtype)
    sizes = plan.encoded((8, 4, 4), (12, 64), (16, 32), config, 7)
    members = {
        "latents": {"npy": np.ones((8, 4, 4), np.float16), "txt": "a dog " * 40, "json": {"a": "b" * 300}},
        "text": text_members(torch.randn(12, 64), torch.arange(12) < 7, config),
        "features": {"features.npy": np.ones((16, 32), np.float16)},
    }
    for name, sample in members.items():
        assert abs(sizes[name] - written(tmp_path, sample)) <= 256, name
    shard = tmp_path / "k.tar"
    write_shard(shard, [{"__key__": "a", **members["latents"]}, {"__key__": "b", **members["latents"]}])
    assert plan.measured([str(shard)]) == sizes["latents"]


def test_flops_of_llama_are_its_matrices():
    length, width, hidden, kv = 128, 2048, 8192, 512
    layer = 2 * length * (2 * width * width + 2 * width * kv + 3 * width * hidden) + 2 * 2 * length**2 * width
    assert encode_flops("llama-3.2-1b", 512, length, (16, 16)) == pytest.approx(16 * layer, rel=1e-3)
    assert encode_flops("shapes-llama", 512, length, (16, 16)) is None


def test_hours_are_flops_over_speed():
    columns = [
        plan.Column("images", 1000),
        plan.Column("latents", 500, 3.6e12),
        plan.Column("text", 100, None),
    ]
    lines = plan.lines(columns, images=10**6, samples=2 * 10**6, training_flops=1.8e12, teraflops=100)
    assert lines[1].split() == ["images", "1,000", "1.0", "0.1"]  # 1000 bytes x 55.6 samples/s
    assert lines[2].split() == ["latents", "500", "0.5", "0.0", "3.600", "10.0"]  # 1e6 x 3.6e12 / 1e14 s
    assert lines[3].split() == ["text", "100", "0.1", "0.0", "not", "counted"]
    assert lines[-2].split()[-2:] == ["1.800", "10.0"]
    assert lines[-1].split()[-2:] == ["3.600", "20.0"]


def test_command(capsys):
    assert main(["plan", "configs/shapes/1_pretrain.yaml", *OPTIMIZER, "--images", "1e6"]) == 0
    assert "44,800 samples" in capsys.readouterr().out
    assert main(["plan", "configs/shapes/3_grpo_clipped.yaml", "--images", "1e6"]) == 2
    assert "stage.kind 'grpo' reads no data" in capsys.readouterr().err
    own = "components.text=llama-3.2-1b=/some/folder"
    assert main(["plan", "configs/nitro_e_512/1_pretrain.yaml", own, "--images", "1e6"]) == 2
    assert "components.text: the shape of 'llama-3.2-1b' from '/some/folder'" in capsys.readouterr().err
