"""The training loop and what it needs: optimisers, averages, processes, checkpoints."""
