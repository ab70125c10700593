"""Studies: variants of recipes, trained over seeds and compared in pairs.

plan       the YAML file, the trainings that it asks for, and what is refused before the first of them
training   each training as a process of its own, and what is known of it afterwards
record     costs, losses and scores of trainings, a line each, from several machines or sittings
measure    from a finished training to its line
results    paired differences of what was measured: tables, JSON, plots
"""
