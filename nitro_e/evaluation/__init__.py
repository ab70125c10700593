"""How good pictures are: a benchmark's prompts drawn by a model, judged, and scored with confidence intervals.

statistics  scores of tasks, means, ratios and paired differences with 95 % intervals
benchmarks  prompts and judge by name
pictures    the pictures of one setting, kept on disk picture by picture with what the judge said
results     scores of settings, results.json, the table
page        report.html: scores, and the pictures with what the judge saw
hook        the same during training
"""
