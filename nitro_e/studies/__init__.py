"""Studies: variants of recipes, trained over seeds and compared in pairs.

plan       the YAML file, the trainings that it asks for, and what is refused before the first of them
training   each training as a process of its own, and what is known of it afterwards
record     scores and costs of trainings, a line each, from several machines or sittings
results    validation losses and scores with paired differences: tables, JSON, a plot
"""
