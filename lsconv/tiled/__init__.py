"""One problem in overlapping tiles: a preconditioner of the whole, made of border solves of its parts."""
