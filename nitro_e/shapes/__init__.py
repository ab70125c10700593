"""The offline domain: captioned scenes of one to four coloured shapes, and an exact judge of images.

scenes   what is asked for (GenEval's six tasks), captions, metadata, layouts, the train / held-out split
render   scenes to pixels
judge    pixels to detected objects to verdicts by GenEval's rules (nitro_e.rewards.geneval); the reward
"""
