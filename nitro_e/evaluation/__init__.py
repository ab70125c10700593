"""How good images are: a benchmark's prompts drawn by a model, judged, and scored with confidence intervals.

statistics  scores of tasks, means, ratios and paired differences with 95 % intervals
benchmarks  prompts and judge by name
images    the images of one setting, kept on disk image by image with what the judge said
results     scores per task and overall, paired differences, tables
evaluate    checkpoints and settings -> results.json and report.html
page        the images of report.html with what the judge saw
training    scores during training
"""
