"""The study: its file, its search space and its run."""
