"""`gspo compare`: a grid of methods, stressors and seeds; each cell is an ordinary run."""
