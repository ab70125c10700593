"""Stage 3: post-training on rewards (GRPO for flow models, and DiffusionNFT).

sde        samplers as one coefficient table; the window of random steps
rollout    drawing images and keeping their trajectories
advantage  scores -> advantages
losses     the objectives, as functions of velocities
policy     the trained model beside its frozen copies; guided velocities with gradients
adapter    LoRA, in files under the released names
groups     which prompts and images, on which process, in which update
stage      all of it on the engine
"""

from nitro_e.stages.grpo.stage import GRPO, GRPOConfig

__all__ = ["GRPO", "GRPOConfig"]
