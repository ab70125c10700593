"""Stage 3: post-training on rewards (GRPO for flow models, and DiffusionNFT). stage.py is the place to start.

sde        samplers as one coefficient table; the window of random steps
rollout    drawing images and keeping their trajectories
advantage  scores -> advantages
groups     the prompts and images of every process and update
policy     the trained model beside its frozen copies
algorithm  interface of an objective; clipped, nft, awm, reward_gradient: the objectives there are; kl: their penalty
stage      the rollouts on the engine
"""

from nitro_e.stages.grpo.stage import GRPO, GRPOConfig

__all__ = ["GRPO", "GRPOConfig"]
