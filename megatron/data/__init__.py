"""Training data: token files, their order, blends, and the micro-batches of a rank.

Import names from the modules that define them: the data commands need the file format (`indexed`, `header`) but not
torch, and start at once.
"""
