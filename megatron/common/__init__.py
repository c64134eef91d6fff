"""What every package may use: user errors, atomic files, processes. Standard library only."""
