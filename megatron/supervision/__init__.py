"""Supervision of a run: heartbeats, watchdog, signals, step times, comparison of replicas, profiler."""
