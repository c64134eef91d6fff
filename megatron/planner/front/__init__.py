"""The planner's command, its text and its picture."""
