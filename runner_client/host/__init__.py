"""The machine as a client sees it: environment of a child, BLAS libraries, doctor."""
