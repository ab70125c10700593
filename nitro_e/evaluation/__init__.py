"""Measuring images: a model draws a benchmark's prompts, rewards score the images, with confidence intervals.

benchmarks  prompts and rewards by name
images      the images of one setting with their scores, drawn and kept on disk
intervals   scores of tasks, ratios and paired differences with 95 % intervals
results     scores per task and overall, paired differences, tables
evaluate    checkpoints and settings -> results.json and report.html
page        the images of report.html with what was detected in them
evaluator   scores during training
"""
