"""Methods side by side: runs from one SFT checkpoint per seed, statistics, a report."""
