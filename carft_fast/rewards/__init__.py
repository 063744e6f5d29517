"""From a completion's text to its grade: answers, LaTeX, programs in a sandbox, a user's own function."""
