"""Post-hoc EMA against closed forms, numeric integration and directly tracked averages."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nitro_e.cli import ema as tool
from nitro_e.config import ConfigError
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.pretrained import save_pretrained
from nitro_e.training import ema
from nitro_e.training.ema import PostHocEMA, gamma_of, list_snapshots, profile_product, solve, synthesize

MICRO = ModelConfig(
    latent_channels=2,
    text_width=4,
    width=16,
    heads=1,
    groups=(1, 1, 1),
    base_grid=4,
    compression=(2,),
    attention=("full",),
)


class Walk(nn.Module):
    """Weights that wander like those of a training run: a drift and a random walk, a function of the step."""

    def __init__(self, size: int = 400, steps: int = 2000):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(steps + 1, size, generator=generator) / steps**0.5
        drift = torch.randn(size, generator=generator)
        self.path = noise.cumsum(0) + drift * (1 - torch.exp(-torch.linspace(0, 3, steps + 1)))[:, None]
        self.weight = nn.Parameter(self.path[0].clone())
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def go_to(self, step: int) -> None:
        self.weight.data.copy_(self.path[step])
        self.count.fill_(step)


def track(tracker: PostHocEMA, walk: Walk, first: int, last: int) -> PostHocEMA:
    for step in range(first, last + 1):
        walk.go_to(step)
        tracker.update(step)
    return tracker


def direct(walk: Walk, sigma_rel: float, step: int) -> torch.Tensor:
    """The integral of the profile over each step times the weights of that step, in float64 (no recursion)."""
    gamma = gamma_of(sigma_rel)
    edges = (torch.arange(0, step + 1, dtype=torch.float64) / step) ** (gamma + 1)
    return edges.diff() @ walk.path[1 : step + 1].double()


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_of_the_profile(sigma_rel):
    """The standard deviation of the density (g+1) t^g on 0..1, integrated numerically."""
    gamma = gamma_of(sigma_rel)
    t = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * t**gamma / len(t)
    mean = (density * t).sum()
    assert np.sqrt((density * (t - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_impossible_widths_are_refused(sigma_rel):
    with pytest.raises(ConfigError, match="sigma_rel is between 0 and 0.289"):
        gamma_of(sigma_rel)


def test_mean_relative_age():
    """Averaging the step itself: its mean age is (1 - (g+1)/(g+2)) of the training, 0.0527 at sigma_rel 0.05."""
    clock = nn.Linear(1, 1, bias=False)
    tracker = PostHocEMA(clock, (0.05, 0.10))
    for step in range(1, 3001):
        clock.weight.data.fill_(step - 0.5)  # the middle of the time the weights stand for
        tracker.update(step)
    ages = [1 - average["weight"].item() / 3000 for average in tracker.averages]
    assert ages[0] == pytest.approx(0.0527, abs=1e-4) and ages[1] == pytest.approx(
        1 / (gamma_of(0.1) + 2), rel=1e-3
    )


def test_averages_follow_the_closed_form():
    walk = Walk()
    tracker = track(PostHocEMA(walk, (0.05, 0.10)), walk, 1, 1500)
    for sigma_rel, average in zip((0.05, 0.10), tracker.averages):
        torch.testing.assert_close(
            average["weight"].double(), direct(walk, sigma_rel, 1500), rtol=1e-4, atol=1e-5
        )


def test_a_step_left_out_counts_for_the_next():
    """Skipped (non-finite) steps leave the weights as they were, so the next weights cover the gap."""
    walk = Walk()
    skipping, complete = PostHocEMA(walk), PostHocEMA(walk)
    for step in range(1, 301):
        walk.go_to(step if step not in (7, 100, 101, 250) else {7: 8, 100: 102, 101: 102, 250: 251}[step])
        complete.update(step)
        if step not in (7, 100, 101, 250):
            skipping.update(step)
    torch.testing.assert_close(
        skipping.averages[0]["weight"], complete.averages[0]["weight"], rtol=1e-4, atol=1e-6
    )


def test_products_of_profiles_against_numeric_integration():
    t = (np.arange(400_000) + 0.5) / 400_000 * 10

    def profile(gamma, end):
        return np.where(t < end, (gamma + 1) * (t / end) ** gamma / end, 0)

    for a, b in [
        ((3.0, 4.0), (7.0, 9.0)),
        ((7.0, 4.0), (3.0, 9.0)),
        ((17.0, 10.0), (17.0, 10.0)),
        ((0.0, 2.0), (5.0, 2.0)),
    ]:
        numeric = (profile(*a) * profile(*b)).sum() * (t[1] - t[0])
        assert profile_product(*map(np.float64, (*a, *b))) == pytest.approx(numeric, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.08, 0.10, 0.15, 0.20])
def test_synthesis_equals_direct_tracking(tmp_path, sigma_rel):
    """25 snapshots in float16 against the average that would have been tracked: cosine 0.999, L2 within 2 %."""
    walk = Walk()
    track(PostHocEMA(walk, folder=tmp_path, every=80), walk, 1, 2000)
    snapshots = list_snapshots(tmp_path)
    assert len(snapshots) == 50
    for step in (2000, 1600):
        state, _ = synthesize(snapshots, sigma_rel, step)
        expected = direct(walk, sigma_rel, step)
        ours = state["weight"].double()
        assert state["weight"].dtype == torch.float32
        assert torch.cosine_similarity(ours, expected, dim=0) >= 0.999
        assert (ours - expected).norm() <= 0.02 * expected.norm()


def test_the_error_of_the_profile_is_the_distance_of_the_curves():
    steps, sigma_rels = np.repeat([100, 200, 300, 400], 2), [0.05, 0.10] * 4
    weights, error = solve(steps, sigma_rels, 400, 0.07)
    t = (np.arange(400_000) + 0.5) / 1000

    def profile(gamma, end):
        return np.where(t < end, (gamma + 1) * (t / end) ** gamma / end, 0)

    wanted = profile(gamma_of(0.07), 400)
    built = sum(w * profile(gamma_of(s), end) for w, s, end in zip(weights, sigma_rels, steps))
    assert weights.sum() == pytest.approx(1)
    assert error == pytest.approx(np.linalg.norm(built - wanted) / np.linalg.norm(wanted), rel=1e-3)


def test_synthesis_refuses_what_the_snapshots_cannot_give(tmp_path):
    walk = Walk(size=4)
    track(PostHocEMA(walk, folder=tmp_path, every=100), walk, 1, 1000)
    snapshots = list_snapshots(tmp_path)
    with pytest.raises(ConfigError, match="a step that has a snapshot: 800, 900"):
        synthesize([s for s in snapshots if s.step in (800, 900, 1000)], 0.08, 950)
    with pytest.raises(ConfigError, match="reach from 100 to 1000"):
        synthesize(snapshots, 0.08, 1001)
    with pytest.raises(ConfigError, match="reach from"):
        synthesize([], 0.08)


def test_a_resumed_tracker_is_exact(tmp_path):
    walk = Walk(size=50)
    whole = track(PostHocEMA(walk, folder=tmp_path / "a", every=50), walk, 1, 300)
    first = track(PostHocEMA(walk, folder=tmp_path / "b", every=50), walk, 1, 170)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    track(first, walk, 171, 260)  # killed here; the checkpoint is that of step 170
    resumed = PostHocEMA(walk, folder=tmp_path / "b", every=50)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    # the rest is superseded
    assert [s.step for s in list_snapshots(tmp_path / "b")] == [50, 50, 100, 100, 150, 150]
    track(resumed, walk, 171, 300)
    for ours, theirs in zip(resumed.averages, whole.averages):
        assert torch.equal(ours["weight"], theirs["weight"])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir()) and len(names) == 12
    for name in names:
        ours, theirs = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert torch.equal(ours["weight"], theirs["weight"]) and torch.equal(ours["count"], theirs["count"])


def test_resume_with_other_profiles_is_refused():
    walk = Walk(size=4)
    saved = track(PostHocEMA(walk, (0.05, 0.10)), walk, 1, 3).state_dict()
    with pytest.raises(ConfigError, match="sigma_rels was"):
        PostHocEMA(walk, (0.05, 0.20)).load_state_dict(saved)
    with pytest.raises(ConfigError, match="another architecture"):
        PostHocEMA(nn.Linear(2, 2), (0.05, 0.10)).load_state_dict(saved)


def test_wrapped_and_low_precision_modules_are_refused():
    with pytest.raises(ValueError, match="bare module"):
        PostHocEMA(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="bare module"):
        PostHocEMA(torch.compile(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="float32 weights, 'weight' is torch.bfloat16"):
        PostHocEMA(nn.Linear(2, 2).bfloat16())
    with pytest.raises(ConfigError, match="two different profiles"):
        PostHocEMA(nn.Linear(2, 2), (0.05,))
    with pytest.raises(ConfigError, match="three decimals"):  # one would overwrite the other's snapshots
        PostHocEMA(nn.Linear(2, 2), (0.0501, 0.0504))


def test_snapshots_are_half_precision_with_an_exact_step_and_what_overflows_is_kept(tmp_path):
    walk = Walk(size=4)
    walk.path[:, 0] = 1e6
    tracker = track(PostHocEMA(walk, folder=tmp_path, every=1000), walk, 1, 2)
    walk.go_to(3)
    tracker.update(70_001)  # past the range of float16
    first, _ = list_snapshots(tmp_path)
    assert first.step == 70_001 and first.sigma_rel == 0.05
    state, _ = synthesize(list_snapshots(tmp_path), 0.05)
    assert state["weight"].isfinite().all() and state["weight"][0] == 1e6 and state["count"] == 3
    Walk(size=4).load_state_dict(state)


def test_a_snapshot_that_cannot_be_written_stops_nothing(tmp_path, disk_of, caplog):
    walk = Walk(size=40_000)
    tracker = track(PostHocEMA(walk, folder=tmp_path, every=10), walk, 1, 10)
    with disk_of(50_000):
        track(tracker, walk, 11, 20)
    assert tracker.failed == 2 and "File too large" in caplog.text
    (tmp_path / "step-0000015-0.050.safetensors").write_bytes(b"not a file of weights")
    assert [s.step for s in list_snapshots(tmp_path)] == [10, 10] and "not readable" in caplog.text
    assert not list(tmp_path.glob("*.tmp"))


def test_the_tool_writes_a_model_folder(tmp_path, capsys):
    torch.manual_seed(0)
    run, model = tmp_path / "run", EMMDiT(MICRO)
    tracker = PostHocEMA(model, folder=run / ema.FOLDER, every=10)
    for step in range(1, 101):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        tracker.update(step)
    checkpoint = run / "checkpoints" / "step-0000100"
    save_pretrained(model, checkpoint / "model", {"codec": "dct"})
    (checkpoint / "meta.json").write_text('{"step": 100}')

    assert tool.main(["list", str(run)]) == 0 and "20 snapshots" in capsys.readouterr().out
    command = ["synthesize", str(run), "--sigma-rel", "0.10", "--out", str(tmp_path / "out")]
    assert tool.main(command) == 0 and "20 snapshots" in capsys.readouterr().out
    loaded = EMMDiT.from_pretrained(tmp_path / "out")
    for name, tensor in tracker.averages[1].items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=2e-3, atol=1e-4)
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        checkpoint / "model" / "config.json"
    ).read_bytes()
    assert tool.main(command) == 2 and "exists" in capsys.readouterr().err
    assert tool.main(["list", str(tmp_path)]) == 2 and "no snapshots" in capsys.readouterr().err


def test_the_errors_in_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \|", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["10", "25", "50", "100"]
    for count, *printed in rows:
        steps = np.repeat(np.arange(1, int(count) + 1), 2)
        errors = {
            s: solve(steps, [0.05, 0.10] * int(count), int(count), s)[1] for s in np.arange(3, 21) / 100
        }
        expected = [
            errors[0.08],
            max(errors[s] for s in errors if 0.05 <= s <= 0.15),
            errors[0.03],
            errors[0.20],
        ]
        for value, error in zip(printed, expected):
            assert float(value) == pytest.approx(100 * error, abs=0.6 * 10 ** -len(value.partition(".")[2]))
