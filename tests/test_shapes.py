"""The offline domain: split, captions, layouts, renderer, rules, judge, shard tool."""

from __future__ import annotations

import io
import itertools
import json
import math
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import nitro_e.cli.make_shapes
from nitro_e.config import ConfigError
from nitro_e.encoders.codec import DCT_SIZES, DCTCodec
from nitro_e.rewards.geneval.rules import Detection, graded, is_correct, is_strict, relations
from nitro_e.shapes import judge as judge_module
from nitro_e.shapes import scenes
from nitro_e.shapes.judge import ShapesReward, find_objects, judge
from nitro_e.shapes.render import render, signed_distance
from nitro_e.shapes.scenes import Object, Request, Scene, Thing, caption, metadata, scene


def pixels_of(drawn: list[Scene], resolution: int = 64) -> torch.Tensor:
    images = np.stack([render(one, resolution) for one in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)


def strict_share(pixels: torch.Tensor, drawn: list[Scene]) -> float:
    verdicts = judge(pixels, [metadata(one.request) for one in drawn])
    return float(np.mean([verdict.strict for verdict in verdicts]))


# --- scenes ---


def test_scene_is_a_pure_function_of_seed_split_index():
    assert scene(3, "train", 17) == scene(3, "train", 17)
    others = [scene(4, "train", 17), scene(3, "heldout", 17), scene(3, "train", 23)]
    assert all(other.texture != scene(3, "train", 17).texture for other in others)
    with pytest.raises(ConfigError, match="split.*'test'"):
        scene(0, "test", 0)


def combinations_of(prompt: str) -> set:
    """What a caption's words name: (color or number, shape), {shape, shape}, (shape, relation, shape)."""
    words = prompt.removeprefix("a photo of ").replace("crosses", "cross").split()
    nouns = [(i, word if word == "cross" else word.rstrip("s")) for i, word in enumerate(words)]
    nouns = [(i, word) for i, word in nouns if word in ("circle", "square", "triangle", "star", "cross")]
    named = {(words[i - 1], shape) for i, shape in nouns}
    if len(nouns) == 2:
        between = [word for word in words if word in ("left", "right", "above", "below")]
        named.add(frozenset(shape for _, shape in nouns))
        named |= {(nouns[0][1], word, nouns[1][1]) for word in between}
    return named


HELD_OUT = {
    *scenes.UNSEEN_COLORED,
    *scenes.UNSEEN_PAIRS,
    *{({2: "two", 3: "three", 4: "four"}[number], shape) for number, shape in scenes.UNSEEN_COUNTS},
    *{(first, relation.split()[0], second) for first, relation, second in scenes.UNSEEN_RELATIONS},
    ("star", "right", "square"),
    ("triangle", "left", "circle"),  # the mirror images, by hand
    ("cross", "below", "star"),
    ("cross", "above", "square"),
}


def test_training_never_names_or_shows_a_held_out_combination():
    shown, named = set(), set()
    for index in range(4000):
        drawn = scene(1, "train", index)
        shown |= {(thing.color, thing.shape) for thing in drawn.objects}
        named |= combinations_of(caption(drawn.request))
    assert not named & HELD_OUT
    assert len(shown) == 5 * 8 - 8 and not shown & HELD_OUT  # every other pair is there


def test_heldout_prompts_are_balanced_and_rightly_flagged():
    prompts = scenes.heldout_prompts(1200, seed=5)
    met = set()
    for tag in scenes.TASKS:
        own = [prompt for prompt in prompts if prompt["tag"] == tag]
        assert len(own) == 200
        assert sum(prompt["seen"] for prompt in own) == (200 if tag == "single_object" else 100)
    for prompt in prompts:
        named = combinations_of(prompt["prompt"])
        assert prompt["seen"] == (not named & HELD_OUT), prompt
        met |= named
    assert HELD_OUT <= met  # every held-out combination is asked for
    assert prompts == scenes.heldout_prompts(1200, seed=5) != scenes.heldout_prompts(1200, seed=6)


@pytest.mark.parametrize(
    "request_, prompt, include, exclude",
    [
        (
            Request("single_object", (Thing("cross"),)),
            "a photo of a cross",
            [{"class": "cross", "count": 1}],
            None,
        ),
        (
            Request("colors", (Thing("star", "orange"),)),
            "a photo of an orange star",
            [{"class": "star", "count": 1, "color": "orange"}],
            None,
        ),
        (
            Request("counting", (Thing("cross", None, 3),)),
            "a photo of three crosses",
            [{"class": "cross", "count": 3}],
            [{"class": "cross", "count": 4}],
        ),
        (
            Request("color_attr", (Thing("star", "red"), Thing("circle", "orange"))),
            "a photo of a red star and an orange circle",
            [
                {"class": "star", "count": 1, "color": "red"},
                {"class": "circle", "count": 1, "color": "orange"},
            ],
            None,
        ),
        (
            Request("position", (Thing("star"), Thing("circle")), "right of"),
            "a photo of a star right of a circle",
            [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["right of", 0]}],
            None,
        ),
    ],
)
def test_captions_and_metadata_follow_geneval(request_, prompt, include, exclude):
    record = metadata(request_)
    assert record["prompt"] == caption(request_) == prompt
    assert record["tag"] == request_.tag and record["include"] == include and record.get("exclude") == exclude


def test_captions_stay_inside_the_vocabulary():
    captions = [caption(scene(2, split, index).request) for split in scenes.SPLITS for index in range(3000)]
    assert {word for text in captions for word in text.split()} == set(scenes.WORDS)
    assert max(len(text.split()) for text in captions) == scenes.MAX_WORDS


def test_layouts_keep_apart_inside_and_true_to_the_relation():
    for index in range(1500):
        drawn = scene(3, "train", index)
        for thing in drawn.objects:
            reach = 1.12 * thing.radius
            assert min(thing.x, thing.y) > reach and max(thing.x, thing.y) < 1 - reach
        for a, b in itertools.combinations(drawn.objects, 2):
            assert math.dist((a.x, a.y), (b.x, b.y)) >= 1.12 * (a.radius + b.radius) + 2.4 / 64
        assert len(drawn.objects) == sum(thing.count for thing in drawn.request.things)
        if drawn.request.relation:
            a, b = drawn.objects
            dx, dy = a.x - b.x, a.y - b.y
            right = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[drawn.request.relation]
            assert right > 0.6 * math.hypot(dx, dy)


# --- renderer ---


def polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1, y down, by plain geometry."""
    r = 1.12
    if shape == "circle":
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 400)]
    if shape == "cross":
        a, b = 0.38, 1.05
        quarter = [(a, -a), (b, -a), (b, a)]
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
        return [(cos * x - sin * y, sin * x + cos * y) for cos, sin in turns for x, y in quarter]
    tips = {"square": 4, "triangle": 3, "star": 10}[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    radii = [r * (0.45 if shape == "star" and i % 2 else 1) for i in range(tips)]
    angles = [start + 2 * math.pi * i / tips for i in range(tips)]
    return [(q * math.cos(angle), q * math.sin(angle)) for q, angle in zip(radii, angles)]


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_rendering_agrees_with_supersampled_polygons(shape):
    thing, scale = Object(shape, "black", 0.47, 0.55, 10.3 / 64, 0.1), 16
    blank = Scene(Request("single_object", (Thing(shape),)), (), 7)
    image = render(blank._replace(objects=(thing,))).astype(float)
    background, dark = render(blank).astype(float), image.min(axis=(0, 1))
    alpha = ((background - image) / (background - dark)).mean(axis=-1)

    canvas = Image.new("L", (64 * scale, 64 * scale))
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    turned = [(cos * x - sin * y, sin * x + cos * y) for x, y in polygon(shape)]
    placed = [(thing.x + thing.radius * x, thing.y + thing.radius * y) for x, y in turned]
    ImageDraw.Draw(canvas).polygon([(x * 64 * scale, y * 64 * scale) for x, y in placed], fill=255)
    expected = np.asarray(canvas).reshape(64, scale, 64, scale).mean(axis=(1, 3)) / 255
    assert np.abs(alpha - expected).max() < 0.4  # the tips of a star are less than a pixel
    assert np.abs(alpha - expected).sum() < 0.02 * expected.sum()


def test_resolution_changes_the_sampling_not_the_image():
    for index in range(12):
        drawn = scene(0, "train", index)
        small, large = render(drawn, 64).astype(float), render(drawn, 128).astype(float)
        assert small.shape == (64, 64, 3) and large.shape == (128, 128, 3)
        assert np.abs(small - large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))).mean() < 1.0


# --- rules ---


def test_relations_by_hand():
    box = (40, 40, 60, 60)
    assert relations((0, 40, 20, 60), box) == {"left of"}
    assert relations(box, (0, 40, 20, 60)) == {"right of"}
    assert relations((40, 0, 60, 20), box) == {"above"}
    assert relations((40, 80, 60, 100), box) == {"below"}
    assert relations((0, 0, 20, 20), box) == {"left of", "above"}  # a diagonal gives two
    assert relations((37, 40, 57, 60), box) == set()  # 3 off, margin .1 * 40 = 4
    assert relations((35, 40, 55, 60), box) == set()  # 5 off: 1 beyond the margin, 1/5 of the offset
    assert relations((30, 40, 50, 60), box) == {"left of"}  # 10 off: 6/10 of it
    assert relations(box, box) == set()


def at(x: float, y: float, name: str | None, color: str | None = "red", score: float = 1.0) -> Detection:
    return Detection(name, color, (x, y, x + 10, y + 10), score)


RED_STAR = metadata(Request("colors", (Thing("star", "red"),)))
TWO = metadata(Request("two_object", (Thing("star"), Thing("circle"))))
THREE = metadata(Request("counting", (Thing("star", count=3),)))
LEFT = metadata(Request("position", (Thing("star"), Thing("circle", "blue")), "left of"))


@pytest.mark.parametrize(
    "record, found, correct, strict, part",
    [
        (RED_STAR, [at(0, 0, "star")], True, True, 1),
        (RED_STAR, [], False, False, 0),
        (RED_STAR, [at(0, 0, "star", "blue")], False, False, 1 / 2),
        (RED_STAR, [at(0, 0, "star", None)], False, False, 1 / 2),
        (RED_STAR, [at(0, 0, "circle")], False, False, 0),
        (RED_STAR, [at(0, 0, "star"), at(30, 0, "circle")], True, False, 1 / 2),
        (RED_STAR, [at(0, 0, "star"), at(30, 0, None)], True, False, 1 / 2),
        # only the most certain of two stars is asked for its color
        (RED_STAR, [at(0, 0, "star", "red", 0.9), at(30, 0, "star", "blue", 0.8)], True, False, 1 / 2),
        (RED_STAR, [at(0, 0, "star", "red", 0.8), at(30, 0, "star", "blue", 0.9)], False, False, 1 / 4),
        (TWO, [at(0, 0, "star"), at(30, 0, "circle")], True, True, 1),
        (TWO, [at(0, 0, "star"), at(30, 0, "star")], False, False, 1 / 4),
        (TWO, [at(0, 0, "circle")], False, False, 1 / 2),
        (THREE, [at(0, 0, "star")] * 2, False, False, 2 / 3),
        (THREE, [at(0, 0, "star")] * 3, True, True, 1),
        (THREE, [at(0, 0, "star")] * 4, False, False, 2 / 3),
        (THREE, [at(0, 0, "star")] * 9, False, False, 0),
        (THREE, [at(0, 0, "star")] * 3 + [at(0, 0, "circle")], True, False, 1 / 2),
        (LEFT, [at(0, 0, "star"), at(30, 0, "circle", "blue")], True, True, 1),
        (LEFT, [at(30, 0, "star"), at(0, 0, "circle", "blue")], False, False, 3 / 4),
        (LEFT, [at(0, 0, "star"), at(0, 30, "circle", "blue")], False, False, 3 / 4),
        (LEFT, [at(0, 0, "star"), at(30, 0, "circle", "red")], False, False, 3 / 4),
        (LEFT, [at(0, 0, "star")], False, False, 1 / 4),
    ],
)
def test_verdicts_by_hand(record, found, correct, strict, part):
    assert is_correct(found, record) is correct
    assert is_strict(found, record) is strict
    assert graded(found, record) == pytest.approx(part)


def test_graded_is_one_exactly_when_strict():
    rng = np.random.default_rng(0)
    strict = 0
    for index in range(6000):
        record = metadata(scene(0, "train", index).request)
        found = []
        for wanted in record["include"]:  # mostly right, with random faults
            for _ in range(wanted["count"] + int(rng.choice([0, 0, 0, 0, -1, 1]))):
                color = wanted.get("color", "red") if rng.random() < 0.9 else None
                found.append(at(*rng.uniform(0, 54, 2), wanted["class"], color, rng.random()))
        found += [at(0, 0, None)] * int(rng.random() < 0.1)
        part = graded(found, record)
        assert 0 <= part <= 1 and (part == 1) == is_strict(found, record)
        assert is_correct(found, record) or not is_strict(found, record)
        strict += is_strict(found, record)
    assert 1000 < strict < 5000


# --- judge ---


@pytest.mark.parametrize("resolution, least", [(64, 0.995), (128, 0.995), (48, 0.99)])
def test_judge_is_right_on_rendered_truth(resolution, least):
    num = 900 if resolution == 64 else 150
    drawn = [scene(11, split, index) for split in scenes.SPLITS for index in range(num)]
    verdicts = judge(pixels_of(drawn, resolution), [metadata(one.request) for one in drawn])
    assert np.mean([verdict.strict for verdict in verdicts]) >= least
    for one, verdict in zip(drawn, verdicts):
        if verdict.strict:  # each object was found for what it is
            truth = sorted((thing.shape, thing.color) for thing in one.objects)
            assert sorted((found.name, found.color) for found in verdict.objects) == truth


def test_boxes_are_tight():
    drawn = [scene(12, "train", index) for index in range(200)]
    for one, found in zip(drawn, find_objects(pixels_of(drawn))):
        assert len(found) == len(one.objects)
        for thing in one.objects:
            cos, sin = math.cos(thing.angle), math.sin(thing.angle)
            turned = np.array([(cos * x - sin * y, sin * x + cos * y) for x, y in polygon(thing.shape)])
            corners = (turned * thing.radius + [thing.x, thing.y]) * 64
            box = [*corners.min(axis=0), *corners.max(axis=0)]
            errors = [np.abs(np.subtract(box, other.box)).max() for other in found]
            assert min(errors) < 2  # pixels; the tips of a star fade
            assert found[int(np.argmin(errors))].name == thing.shape


def change_color(one: Scene, rng: np.random.Generator) -> Scene | None:
    asked = [i for i, thing in enumerate(one.request.things) if thing.color]
    if not asked:
        return None
    i = rng.choice(asked)
    color = rng.choice([color for color in scenes.COLORS if color != one.objects[i].color])
    return replace_object(one, i, color=str(color))


def change_shape(one: Scene, rng: np.random.Generator) -> Scene:
    i = rng.integers(len(one.objects))
    shape = rng.choice([shape for shape in scenes.SHAPES if shape != one.objects[i].shape])
    return replace_object(one, i, shape=str(shape))


def change_count(one: Scene, rng: np.random.Generator) -> Scene | None:
    """Remove an object, or add one more like it where there is room."""
    if one.request.tag != "counting":
        return None
    if rng.random() < 0.5:
        i = rng.integers(len(one.objects))
        return one._replace(objects=one.objects[:i] + one.objects[i + 1 :])
    for x, y in rng.uniform(0.16, 0.84, (200, 2)):
        new = one.objects[0]._replace(x=x, y=y, radius=7.5 / 64)
        distances = [math.dist((x, y), (o.x, o.y)) - 1.12 * (o.radius + new.radius) for o in one.objects]
        if min(distances) > 2.5 / 64:
            return one._replace(objects=(*one.objects, new))
    return None


def change_relation(one: Scene, rng: np.random.Generator) -> Scene | None:
    if not one.request.relation:
        return None
    a, b = one.objects
    if rng.random() < 0.5:  # exchange the places
        a, b = a._replace(x=b.x, y=b.y, radius=b.radius), b._replace(x=a.x, y=a.y, radius=a.radius)
        return one._replace(objects=(a, b))
    return one._replace(objects=(a._replace(x=a.y, y=a.x), b._replace(x=b.y, y=b.x)))  # beside becomes above


def replace_object(one: Scene, i: int, **changes) -> Scene:
    return one._replace(objects=(*one.objects[:i], one.objects[i]._replace(**changes), *one.objects[i + 1 :]))


@pytest.mark.parametrize("change", [change_color, change_shape, change_count, change_relation])
def test_no_false_correct_on_hard_negatives(change):
    rng = np.random.default_rng(21)
    wrong, index = [], 0
    while len(wrong) < 500:
        changed = change(scene(13, scenes.SPLITS[index % 2], index), rng)
        wrong += [changed] if changed else []
        index += 1
    verdicts = judge(pixels_of(wrong), [metadata(one.request) for one in wrong])
    assert not any(verdict.strict or verdict.geneval or verdict.partial == 1 for verdict in verdicts)


def blur(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    kernel = torch.exp(-(torch.arange(-5, 6).float() ** 2) / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).repeat(3, 1, 1, 1)
    return F.conv2d(F.pad(pixels, (5, 5, 5, 5), mode="replicate"), kernel, groups=3)


def noise(pixels: torch.Tensor, sigma: float, rng: torch.Generator) -> torch.Tensor:
    return (pixels + 2 * sigma * torch.randn(pixels.shape, generator=rng)).clamp(-1, 1)


def half_size(pixels: torch.Tensor) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")


CODEC = DCTCodec(*DCT_SIZES["dct-f8c24"])  # 29 dB on these images


def noisy_latents(pixels: torch.Tensor, sigma: float, rng: torch.Generator) -> torch.Tensor:
    latents = CODEC.normalize(CODEC.encode_pixels(pixels))
    return latents + sigma * torch.randn(latents.shape, generator=rng)


def jpeg(pixels: torch.Tensor) -> torch.Tensor:
    out = []
    for image in ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=75)
        out.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(out).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p, g: noise(p, 0.1, g), id="noise .1"),
        pytest.param(lambda p, g: blur(p, 1.0), id="blur 1 px"),
        pytest.param(lambda p, g: noise(blur(p, 0.7), 0.05, g), id="blur .7, noise .05"),
        pytest.param(lambda p, g: half_size(p), id="half size"),
        pytest.param(lambda p, g: jpeg(p), id="jpeg 75"),
        pytest.param(lambda p, g: CODEC.decode(CODEC.normalize(CODEC.encode_pixels(p))), id="dct-f8c24"),
        pytest.param(lambda p, g: CODEC.decode(noisy_latents(p, 0.1, g)), id="dct-f8c24, noisy latents"),
        pytest.param(lambda p, g: 0.75 * p, id="contrast .75"),
        pytest.param(lambda p, g: (p * 127.5).round().to(torch.bfloat16) / 127.5, id="bfloat16"),
    ],
)
def test_judge_is_robust(damage):
    drawn = [scene(14, "heldout", index) for index in range(400)]
    assert strict_share(damage(pixels_of(drawn), torch.Generator().manual_seed(0)), drawn) >= 0.99


def disk(x: float, y: float, radius: float, size: int = 64) -> torch.Tensor:
    row = torch.arange(size) + 0.5
    return (row - x) ** 2 + (row[:, None] - y) ** 2 < radius**2


def paint(*layers: tuple[torch.Tensor, str]) -> torch.Tensor:
    image = torch.full((3, 64, 64), 0.9)
    for mask, color in layers:
        image[:, mask] = torch.tensor(scenes.PALETTE[color])[:, None]
    return image * 2 - 1


def test_tricks_earn_nothing():
    circle, whole = disk(32, 32, 12), torch.ones(64, 64, dtype=torch.bool)
    half = circle & (torch.arange(64) < 32)
    tricks = {
        "blank": paint(),
        "flooded": paint((whole, "red")),
        "two-tone": paint((circle, "red"), (half, "blue")),
        "ring": paint((circle & ~disk(32, 32, 8), "red")),
        "checkerboard": paint((circle & ((torch.arange(64) + torch.arange(64)[:, None]) % 2 == 0), "red")),
        "too small": paint((disk(32, 32, 3), "red")),
        "merged with another": paint((circle | disk(52, 32, 9), "red")),
        "nan": torch.full((3, 64, 64), float("nan")),
        "noise": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    }
    red_circle = metadata(Request("colors", (Thing("circle", "red"),)))
    images = torch.stack([*tricks.values(), paint((circle, "red"))])
    verdicts = judge(images, [red_circle] * len(images))
    assert {name: verdict.geneval for name, verdict in zip(tricks, verdicts)} == dict.fromkeys(tricks, False)
    assert verdicts[-1].strict  # the honest one
    debris = judge(paint((circle, "red"), (disk(8, 8, 2.5), "blue"))[None], [red_circle])[0]
    assert debris.geneval and not debris.strict and debris.partial == 0.5


def regular(corners: int, inner: float = 1.0, turn: float = 0.0, width: float = 1.0) -> list:
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    radii = [inner if i % 2 else 1.0 for i in range(corners)]
    return [(width * r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles)]


@pytest.mark.parametrize("radius", [9, 13])
def test_other_shapes_have_no_name(radius):
    strangers = {
        "diamond": regular(4),
        "triangle on its tip": regular(3, turn=math.pi),
        "star on its tip": regular(10, inner=0.45, turn=math.pi),
        "star of four": regular(8, inner=0.4),
        "star of six": regular(12, inner=0.5),
        "ellipse": regular(60, width=0.7),
        "rectangle": [(-1, -0.6), (1, -0.6), (1, 0.6), (-1, 0.6)],
        "right triangle": [(-1, -1), (1, 1), (-1, 1)],
        "trapezoid": [(-0.4, -1), (0.4, -1), (1, 1), (-1, 1)],
        "L": [(-1, -1), (0, -1), (0, 0), (1, 0), (1, 1), (-1, 1)],
        "half a disk": [(math.sin(a), math.cos(a)) for a in np.linspace(0, math.pi, 30)],
    }
    known = {shape: polygon(shape) for shape in scenes.SHAPES}
    images = []
    for corners in (strangers | known).values():
        canvas = Image.new("L", (512, 512))
        placed = [((32 + radius * x) * 8, (32 + radius * y) * 8) for x, y in corners]
        ImageDraw.Draw(canvas).polygon(placed, fill=1)
        inside = torch.from_numpy(np.array(canvas)).float().reshape(64, 8, 64, 8).mean(dim=(1, 3))
        images.append(paint((torch.ones(64, 64, dtype=torch.bool), "blue")).lerp(paint(), 1 - inside))
    names = [[thing.name for thing in found] for found in find_objects(torch.stack(images))]
    assert names == [[None]] * len(strangers) + [[shape] for shape in known]


def test_objects_at_the_edge_are_judged_as_they_are_seen():
    square, disk_half_outside = torch.zeros(64, 64, dtype=torch.bool), disk(0, 32, 12)
    square[:18, 46:] = True
    found = find_objects(torch.stack([paint((square, "green")), paint((disk_half_outside, "green"))]))
    assert [[thing.name for thing in things] for things in found] == [["square"], [None]]
    assert found[0][0].box == (46, 0, 64, 18)


def flood_fill(mask: np.ndarray) -> np.ndarray:
    labels, fresh = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask)):
        if labels[start]:
            continue
        fresh += 1
        stack = [start]
        while stack:
            b, y, x = stack.pop()
            inside = 0 <= y < mask.shape[1] and 0 <= x < mask.shape[2]
            if inside and mask[b, y, x] and not labels[b, y, x]:
                labels[b, y, x] = fresh
                stack += [(b, y + 1, x), (b, y - 1, x), (b, y, x + 1), (b, y, x - 1)]
    return labels


def test_components_equal_flood_fill():
    rng = np.random.default_rng(0)
    masks = np.stack([rng.random((20, 24)) < share for share in (0.0, 0.2, 0.5, 0.6, 0.8, 1.0)] * 3)
    snake = np.ones((20, 24), bool)
    snake[1::2] = False
    snake[1::4, -1] = snake[3::4, 0] = True  # one long path through all rows
    masks[0] = snake
    mine, reference = judge_module._components(masks), flood_fill(masks)
    pairs = set(zip(mine.ravel().tolist(), reference.ravel().tolist()))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})  # one to one
    assert ((mine > 0) == masks).all()


def test_batching_and_device_dtype_do_not_matter():
    drawn = [scene(15, "train", index) for index in range(20)]
    pixels = pixels_of(drawn)
    together = find_objects(pixels)
    assert together == [find_objects(image[None])[0] for image in pixels]
    assert together == find_objects(pixels.double())
    assert find_objects(pixels[:0]) == []


def test_the_color_score_asks_for_colors_alone():
    red, blue = Thing("circle", "red"), Thing("square", "blue")
    drawn = Scene(Request("colors", (red,)), (Object("circle", "red", 0.5, 0.5, 0.15, 0.0),), 7)
    pixels = pixels_of([drawn] * 5)
    asked = [
        Request("colors", (red,)),
        Request("colors", (Thing("star", "red"),)),
        Request("colors", (blue,)),
        Request("color_attr", (red, blue)),
        Request("single_object", (Thing("circle"),)),
    ]
    info = [metadata(request) for request in asked]
    found = ShapesReward("color")(pixels, [record["prompt"] for record in info], info).tolist()
    assert found[:4] == [1.0, 1.0, 0.0, 0.5] and np.isnan(found[4])


def test_reward():
    drawn = [scene(16, "train", index) for index in range(12)]
    info = [metadata(one.request) for one in drawn]
    prompts = [record["prompt"] for record in info]
    pixels = pixels_of(drawn)
    pixels[0] = 1.0  # an empty image
    for score in ("mixed", "strict", "geneval", "partial"):
        reward = ShapesReward(score)(pixels, prompts, info)
        assert reward.shape == (12,) and reward.dtype == torch.float32
        assert reward.tolist() == [0.0] + [1.0] * 11
    other = metadata(Request("two_object", (Thing("circle"), Thing("star"))))
    half = ShapesReward()(pixels[1:2], [other["prompt"]], [other])
    assert 0 <= half.item() < 0.5  # mixed cannot reach a half without being strict
    with pytest.raises(ConfigError, match="unknown score 'best'"):
        ShapesReward("best")
    with pytest.raises(ConfigError, match="12 images but 1 metadata"):
        judge(pixels, info[:1])
    with pytest.raises(ConfigError, match="has no 'include'"):
        judge(pixels[:1], [{"prompt": "a dog"}])


# --- shards ---


@pytest.fixture
def tool():
    return nitro_e.cli.make_shapes


def test_shards_hold_the_scenes(tool, tmp_path):
    tool.main(f"{tmp_path} --split heldout --num 25 --samples-per-shard 10 --seed 2".split())
    paths = sorted(tmp_path.glob("*.tar"))
    assert [path.name for path in paths] == [f"shapes-heldout-{i:06d}.tar" for i in range(3)]
    index = 0
    for path in paths:
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in dict.fromkeys(name.split(".")[0] for name in members):
            drawn = scene(2, "heldout", index)
            image = np.array(Image.open(io.BytesIO(members[f"{key}.png"])))
            assert np.array_equal(image, render(drawn))
            record = json.loads(members[f"{key}.json"])
            objects = record.pop("objects")
            assert record == metadata(drawn.request)
            assert [Object(**thing) for thing in objects] == list(drawn.objects)
            assert members[f"{key}.txt"].decode() == record["prompt"]
            index += 1
    assert index == 25
    assert Image.open(tmp_path / "shapes-heldout.png").size == (12 * 66, 6 * 66)


def test_shards_are_reproducible_resumable_and_never_mixed(tool, tmp_path):
    args = dict(split="train", num=12, samples_per_shard=6, seed=0, resolution=48)
    first = tool.make_shards(tmp_path / "a", **args)
    again = tool.make_shards(tmp_path / "b", **args)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]

    first[0].write_bytes(b"finished")  # a finished shard is not touched, a missing one is written
    first[1].unlink()
    tool.make_shards(tmp_path / "a", **args)
    assert first[0].read_bytes() == b"finished" and first[1].read_bytes() == again[1].read_bytes()

    changes = dict(num=18, samples_per_shard=3, seed=1, resolution=64, tasks=["counting"])
    for key, value in changes.items():
        with pytest.raises(ConfigError, match=key.replace("_", "-")):
            tool.make_shards(tmp_path / "b", **(args | {key: value}))
    with pytest.raises(ConfigError, match="--num 0"):
        tool.make_shards(tmp_path / "c", **(args | {"num": 0}))


def test_shards_of_some_tasks_hold_their_scenes_of_the_whole_domain(tool, tmp_path):
    tasks = ["two_object", "counting"]
    (path,) = tool.make_shards(tmp_path, "train", 8, resolution=48, tasks=tasks)
    with tarfile.open(path) as tar:
        records = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith("json")]
    assert [record["tag"] for record in records] == tasks * 4
    whole = [metadata(scene(0, "train", index).request) for index in range(24)]
    assert [record["prompt"] for record in records if record["tag"] == "counting"] == [
        record["prompt"] for record in whole if record["tag"] == "counting"
    ]
    with pytest.raises(ConfigError, match="names one twice"):
        tool.make_shards(tmp_path / "d", "train", 8, tasks=["counting", "counting"])


def test_signed_distance_is_zero_on_every_outline():
    for shape in scenes.SHAPES:
        corners = polygon(shape)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
            x, y = np.array([(x0 + x1) / 2]), np.array([(y0 + y1) / 2])
            assert abs(signed_distance(shape, x, y)[0]) < 1e-3
        assert signed_distance(shape, np.zeros(1), np.zeros(1))[0] < -0.3
