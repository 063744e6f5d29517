"""What every room needs: errors, seeds, processes, files that survive a kill, what a run says."""
