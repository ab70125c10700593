"""Distillation into few steps. stage.py is the place to start; docs/distill.md has the recipes.

inputs       student times, noised inputs, the one forward per step
objective    the form of an objective; regression, adversarial: the objectives there are
heads, pool  the discriminator: frozen features, a head per place, or NitroFusion's pool of heads
losses       over logits
guards       what is watched, and when training stops by itself
presets      ladd4, nitro1, nitrofusion, sana_adv, reflow
"""

from nitro_e.stages.distill.stage import Distill, DistillConfig, DistillRun

__all__ = ["Distill", "DistillConfig", "DistillRun"]
