"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): its rules over detected objects.

rules    detections to verdicts, pure Python
"""
