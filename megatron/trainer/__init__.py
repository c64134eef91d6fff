"""The training loop and what it drives: optimizer, schedule, batches, evaluation, logs.

You are here: launcher -> model -> **trainer** -> checkpoint.
"""
