"""Diversity of images of one prompt: from drawn scenes to the figure, against what was drawn."""

import itertools
import math

import numpy as np
import pytest

from nitro_e.config import ConfigError
from nitro_e.data.prompts import Prompt
from nitro_e.evaluation.diversity import Spread, ratio, spread, spreads
from nitro_e.evaluation.images import ScoredImage, to_image
from nitro_e.files import save_png
from nitro_e.rewards.geneval.rules import Detection
from nitro_e.shapes.render import render
from nitro_e.shapes.scenes import Request, Scene, Thing, draw_objects, metadata

REQUESTS = [
    Request("single_object", (Thing("square"),)),
    Request("colors", (Thing("circle", "red"),)),
    Request("counting", (Thing("square", None, 2),)),
    Request("two_object", (Thing("circle"), Thing("square"))),
]


def drawn(request, tmp_path, index, wrong=()):
    """Write six images of a request, some of another one, and return their rows and scenes."""
    rng = np.random.default_rng(index)
    other = Request("single_object", (Thing("star"),))
    record, scenes, rows = metadata(request), [], []
    for number in range(6):
        shown = Scene(other if number in wrong else request, (), 0)
        shown = shown._replace(objects=draw_objects(rng, shown.request), texture=number)
        scenes.append(shown)
        rows.append(ScoredImage(index, number, record["prompt"], {}, "", 0.0))
        image = to_image_of(render(shown))
        save_png(image, tmp_path / rows[-1].file)
    return Prompt(record["prompt"], record), rows, scenes


def to_image_of(pixels):
    import torch

    return to_image(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("index", range(len(REQUESTS)))
def test_spread_is_that_of_the_objects_that_were_drawn(index, tmp_path):
    """Places and colors of drawn objects, compared pair by pair here, without the judge; image 2 is of another prompt."""
    request = REQUESTS[index]
    prompt, rows, scenes = drawn(request, tmp_path, index, wrong=(2,))
    (found,) = spreads([prompt], [row._replace(index=0) for row in renamed(rows, tmp_path)], tmp_path)
    places, colors = [], []
    right = [scene.objects for number, scene in enumerate(scenes) if number != 2]
    for thing in request.things:
        for one, two in itertools.combinations(right, 2):
            ours, theirs = ([o for o in objects if o.shape == thing.name] for objects in (one, two))
            x = np.mean([o.x for o in ours]) - np.mean([o.x for o in theirs])
            y = np.mean([o.y for o in ours]) - np.mean([o.y for o in theirs])
            places.append(math.hypot(x, y))
            colors.append(sorted(o.color for o in ours) != sorted(o.color for o in theirs))
    assert found.place == pytest.approx(np.mean(places), abs=0.01)  # boxes are whole pixels of 64
    if request.things[0].color is None:
        assert found.color == pytest.approx(np.mean(colors))
    else:
        assert math.isnan(found.color)
    # a square's box has the side 1.12 sqrt(2) r before it is turned
    if request.tag == "single_object":
        sizes = [1.12 * math.sqrt(2) * o[0].radius for o in right]
        expected = np.mean([abs(a - b) for a, b in itertools.combinations(sizes, 2)])
        assert found.size == pytest.approx(expected, abs=0.02)


def renamed(rows, folder):
    """Give the images of a prompt the index 0, in their names too."""
    for row in rows:
        (folder / row.file).rename(folder / row._replace(index=0).file)
    return rows


def test_equal_images_have_no_spread_and_one_image_has_no_pair():
    record = metadata(REQUESTS[0])
    image = [Detection("square", "red", (10.0, 10.0, 20.0, 20.0))]
    assert spread([image, image, image], record, 64) == (0, 0, 0)
    assert all(map(math.isnan, spread([image], record, 64)))
    moved = [Detection("square", "blue", (13.0, 14.0, 29.0, 18.0))]
    assert spread([image, moved], record, 64) == pytest.approx(
        (math.hypot(21 - 15, 16 - 15) / 64, (10 - 8) / 64, 1)
    )


def test_ratio_is_over_prompts_that_both_have():
    nan = math.nan
    ours = [Spread(0.2, 0.1, 0.5), Spread(0.4, 0.3, nan), Spread(nan, nan, nan)]
    theirs = [Spread(0.4, 0.1, 1.0), Spread(nan, 0.1, nan), Spread(0.3, 0.2, 0.5)]
    assert ratio(ours, theirs) == pytest.approx((0.2 / 0.4 + (0.1 + 0.3) / (0.1 + 0.1) + 0.5 / 1.0) / 3)
    assert ratio(theirs, theirs) == pytest.approx(1)
    assert math.isnan(ratio([Spread(nan, nan, nan)], [theirs[0]]))
    with pytest.raises(ConfigError, match="same prompts"):
        ratio(ours, theirs[:2])
