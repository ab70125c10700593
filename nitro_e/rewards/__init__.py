"""Rewards: images and their prompts -> scores, by name.

A reward is a callable
    reward(pixels (B, 3, H, W) float32 in -1..1, prompts: Sequence[str], info: Sequence[dict]) -> (B,) float32
where NaN means "could not be scored"; it is never replaced by a number. `reward.source`, if there is one, names its
weights.

registry   names -> builders, the decorator for your own
scorer     several of them, weighted or monitored: RewardConfig, build_rewards, Scorer
"""

from nitro_e.rewards.registry import reward
from nitro_e.rewards.scorer import RewardConfig, Scorer, Scores, build_rewards, reward_of_prompts, win_rates

__all__ = ["RewardConfig", "Scorer", "Scores", "build_rewards", "reward", "reward_of_prompts", "win_rates"]
