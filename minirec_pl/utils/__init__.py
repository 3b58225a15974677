"""What every part uses: errors, files, seeds, costs, checkpoints, run folders and ranks."""
