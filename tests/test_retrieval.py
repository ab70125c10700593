"""The judge of pictures by retrieval, against slow counting, with a real network of the class it loads."""

import io
import json
import tarfile

import pytest
import torch
from safetensors.torch import save_file

from nitro_e.config import ConfigError
from nitro_e.data.prompts import Prompt, PromptsConfig, load_prompts
from nitro_e.evaluation.benchmarks import benchmark
from nitro_e.rewards import RewardConfig, build_rewards
from nitro_e.rewards.retrieval import SCORES, Retrieval, StyleNetwork

STYLES = ["flat", "noto"]
CONCEPTS = [f"thing {number}" for number in range(30)]


@pytest.fixture(scope="module")
def pictures():
    """Sixty pictures, two per concept: (60, 3, 32, 32) in -1..1 and their records."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(60, 3, 4, 4, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    return pixels, [dict(concept=concept, style=style) for style in STYLES for concept in CONCEPTS]


@pytest.fixture(scope="module")
def judge_folder(pictures, tmp_path_factory):
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    save_file(StyleNetwork(len(STYLES), width=16).state_dict(), folder / "style.safetensors")
    network = timm.create_model("resnet10t", num_classes=8 + len(STYLES), channels=(8, 8, 8, 8), stem_width=8)
    save_for_hf(
        network, folder, safe_serialization=True, model_args={"channels": (8, 8, 8, 8), "stem_width": 8}
    )
    pixels, info = pictures
    with torch.no_grad():
        embeddings = network.eval()(pixels)[:, :8]
    save_file(
        {
            "embeddings": torch.nn.functional.normalize(embeddings, dim=-1).half(),
            "concept": torch.tensor([CONCEPTS.index(record["concept"]) for record in info]),
            "style": torch.tensor([STYLES.index(record["style"]) for record in info]),
            "is_train": torch.arange(60) % 7 != 0,
        },
        folder / "gallery.safetensors",
    )
    names = {"size": 32, "width": 8, "style": STYLES, "concept": CONCEPTS}
    (folder / "judge.json").write_text(json.dumps(names))
    return folder


def test_verdicts_equal_slow_counting(pictures, judge_folder):
    """Rank, style, probability and the nearest training picture, by loops over single pictures."""
    pixels, info = pictures
    generated = pixels[:20] + 0.8 * torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    judge = Retrieval(str(judge_folder))
    verdicts = judge.judge(generated, info[:20])

    def embedding(picture):
        out = judge.network(picture[None])[0]
        return out[:8] / out[:8].norm(), judge.styles(picture[None])[0]

    real = [embedding(picture)[0].half().float() for picture in pixels]
    for row, verdict in enumerate(verdicts):
        mine, logits = embedding(generated[row])
        similar = [float(mine @ other / other.norm()) for other in real]
        rivals = [score for score, record in zip(similar, info) if record["style"] == info[row]["style"]]
        assert verdict.rank == 1 + sum(score > similar[row] + 1e-6 for score in rivals)
        assert verdict.style == STYLES[int(logits.argmax())]
        wanted = STYLES.index(info[row]["style"])
        assert verdict.probability == pytest.approx(
            float(logits.exp()[wanted] / logits.exp().sum()), abs=1e-5
        )
        shown = [number for number in range(60) if number % 7]
        near = max(shown, key=similar.__getitem__)
        assert verdict.nearest == f"{info[near]['concept']}, {info[near]['style']}"
        assert verdict.distance == pytest.approx(1 - similar[near], abs=1e-5)
    assert len({verdict.rank for verdict in verdicts}) > 5  # the noise makes it more than a copy


def test_a_real_picture_has_rank_one(pictures, judge_folder):
    pixels, info = pictures
    judge = Retrieval(str(judge_folder), score="reciprocal_rank")
    assert judge(pixels, [""] * 60, info).tolist() == [1.0] * 60
    assert "rank 1; nearest training picture: thing 1, flat (0.00)" in judge.said[1]
    assert judge.said[7].endswith("nearest training picture: thing 7, flat (0.00)") is False  # it is held out


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_what_they_say(score, pictures, judge_folder):
    pixels, info = pictures
    verdicts = Retrieval(str(judge_folder)).judge(pixels[:9], info[:9])
    found = Retrieval(str(judge_folder), score=score)(pixels[:9], [""] * 9, info[:9]).tolist()
    for value, verdict, record in zip(found, verdicts, info):
        right, first = verdict.style == record["style"], verdict.rank <= 10
        expected = {
            "both": right and first,
            "style": right,
            "top10": first,
            "reciprocal_rank": 1 / verdict.rank,
            "mixed": 0.5 * verdict.probability + 0.5 / verdict.rank,
            "novelty": verdict.distance,
        }[score]
        assert value == pytest.approx(float(expected), abs=1e-6)


def test_several_scores_of_one_judge_explain_themselves_once(pictures, judge_folder):
    """The page showed the same words once per score."""
    pixels, info = pictures
    scorer = build_rewards(
        [
            RewardConfig(name="retrieval", label=score, path=str(judge_folder), options={"score": score})
            for score in ("both", "style", "novelty")
        ]
    )
    scorer(pixels[:2], ["", ""], info[:2])
    assert [words.count("nearest training picture") for words in scorer.said] == [1, 1]


def test_the_style_is_told_from_47_pixels_at_a_time():
    """A cell of the last map does not change with what is further away; the logits follow from the mean cell and the maxima."""
    torch.manual_seed(0)
    network = StyleNetwork(3, width=16).eval()
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    near = picture.clone()
    near[..., 64 - 30 : 64 + 30, 64 - 30 : 64 + 30] = 0.5
    far = picture.clone()
    far[..., :34, :] = far[..., 94:, :] = far[..., :34] = far[..., 94:] = 0.5
    with torch.no_grad():
        maps = [network.convolutions(pixels) for pixels in (picture, near, far)]  # (1, 16, 16, 16)
        torch.testing.assert_close(maps[0][..., 8, 8], maps[2][..., 8, 8])
        assert (maps[0][..., 8, 8] - maps[1][..., 8, 8]).abs().max() > 1e-4
        seen = torch.cat([maps[0].mean((2, 3)), maps[0].flatten(2).max(2).values], 1)
        hidden = (seen @ network.hidden.weight.T + network.hidden.bias).clamp(min=0)
        expected = hidden @ network.head.weight.T + network.head.bias
        torch.testing.assert_close(network(picture), expected)


def test_bad_records_and_folders_are_refused(pictures, judge_folder, tmp_path):
    pixels, _ = pictures
    judge = Retrieval(str(judge_folder))
    for record, message in (
        ({}, 'no "concept"'),
        ({"concept": "thing 1"}, 'no "style"'),
        ({"concept": "thing 1", "style": "flut"}, "knows no style 'flut'.*flat"),
        ({"concept": "nothing", "style": "flat"}, "knows no concept 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=message):
            judge(pixels[:1], [""], [record])
    with pytest.raises(ConfigError, match="no score 'bth'.*both"):
        Retrieval(str(judge_folder), score="bth")
    with pytest.raises(ConfigError, match="needs the folder of a judge"):
        Retrieval()
    with pytest.raises(ConfigError, match="reward 'retrieval'"):
        Retrieval(str(tmp_path))


def test_the_benchmark_asks_for_what_training_never_showed():
    """Its 463 prompts are cells that training does not have; concepts of one kind are known from other styles."""
    held, shown = (load_prompts(PromptsConfig(source=f"emoji-{part}")) for part in ("heldout", "train"))
    assert (len(held), len(shown)) == (463, 6894)
    cells = {(prompt.info["concept"], prompt.info["style"]) for prompt in shown}
    concepts = {concept for concept, _ in cells}
    for prompt in held:
        assert (prompt.info["concept"], prompt.info["style"]) not in cells
        assert (prompt.info["concept"] in concepts) == (prompt.info["tag"] == "unseen pair")
        assert prompt.text == f"an emoji of {prompt.info['concept']}, {prompt.info['style']} style"
    assert benchmark("emoji", path="judge").load_prompts() == held


def test_captions_of_a_shard_are_prompts(tmp_path):
    """A shard's captions come with the json member; samples without a caption and broken tars are refused."""

    def shard(name, members):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member_name, content in members:
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return str(tmp_path / name)

    good = shard(
        "good.tar",
        [("a.txt", b"a fox "), ("a.json", b'{"tag": "x"}'), ("b.txt", b"two cats"), ("b.png", b"")],
    )
    prompts = load_prompts(PromptsConfig(source=good))
    assert prompts == [Prompt("a fox", {"prompt": "a fox", "tag": "x"}), Prompt("two cats", {})]
    with pytest.raises(ConfigError, match="1 of 2 samples have no caption"):
        load_prompts(PromptsConfig(source=shard("bad.tar", [("a.txt", b"a fox"), ("b.json", b"{}")])))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "good.tar").read_bytes()[:700])
    with pytest.raises(ConfigError, match="cut.tar"):
        load_prompts(PromptsConfig(source=str(tmp_path / "cut.tar")))
