"""Generates text and images from a checkpoint, at any TP x PP x DP."""
