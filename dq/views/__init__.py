"""Pages that show what a plan does to a model; a file each."""
