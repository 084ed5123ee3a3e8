"""The recipes: what a batch's loss is. One objective family a file; the loop trains them all."""
