"""One loop, many recipes, checkpoints, and the child process that runs a stage."""
