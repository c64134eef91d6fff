"""What watches a run: signs of life, watchdog, signals, step times, comparison of replicas, profiler."""
