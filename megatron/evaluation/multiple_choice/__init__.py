"""Multiple-choice tests: questions and options in, scores with their uncertainty out."""
