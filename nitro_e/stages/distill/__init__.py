"""Stage 4: distillation into few steps. stage.py is the place to start; docs/distill.md has the recipes.

inputs       student times, noised inputs, the one x0 prediction per step
sources      batches: stored pairs of the teacher, or prompts alone
objective    interface of an objective; regression, adversarial, score, imitate, flow_map, reward: those there are
heads, pool  the discriminator: frozen features with a head per feature map, or NitroFusion's pool of heads
gan_losses   losses of logits
guards       monitors of the student, and the limits at which training stops by itself
presets      the known methods as values of the config
"""

from nitro_e.stages.distill.stage import Distill, DistillConfig, DistillRun

__all__ = ["Distill", "DistillConfig", "DistillRun"]
