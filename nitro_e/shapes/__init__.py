"""The offline domain: captioned scenes of one to four coloured shapes, and an exact judge of pictures.

scenes   what is asked for (GenEval's six tasks), captions, metadata, layouts, the train / held-out split
render   scenes to pixels
rules    GenEval's rules over detected objects
judge    pixels to detected objects to verdicts; the reward
"""
