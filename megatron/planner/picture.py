"""A plan as a picture: the pipeline's schedule of one step with its bubble, and the memory of every stage.

The schedule is DeepSpeed's own (`deepspeed.runtime.pipe.schedule.TrainSchedule`): its instructions are laid out on a
time axis by who waits for whom. Needs matplotlib.
"""
