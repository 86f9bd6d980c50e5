"""The client's machine: environment of a child, BLAS libraries, doctor."""
