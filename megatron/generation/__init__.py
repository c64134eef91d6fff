"""Text from a checkpoint at any TP x PP x DP."""
