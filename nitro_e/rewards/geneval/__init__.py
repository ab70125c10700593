"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): prompts, rules, and the models that look at the images.

tasks      a prompt's request: its wording and its metadata record
generator  the 553 test prompts; training prompts that ask for none of the same images
rules      detections to verdicts, pure Python
detector   pixels to objects and masks: Mask2Former
openmmlab  the benchmark's own weights for it
colors     the detector's confident objects, with colors from CLIP
reward     all of it as a reward, which recipes call `geneval`
"""
